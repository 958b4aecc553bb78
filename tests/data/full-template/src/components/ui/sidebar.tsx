import { styled } from "@/lib/styled"

export const Sidebar = styled("aside", "w-48 border-r p-4")
export const SidebarItem = styled("div", "rounded px-2 py-1 text-sm hover:bg-muted")
