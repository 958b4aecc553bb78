import * as Primitive from "@radix-ui/react-dropdown-menu"
import { styled } from "@/lib/styled"

export const DropdownMenu = Primitive.Root
export const DropdownMenuTrigger = Primitive.Trigger
export const DropdownMenuContent = styled(Primitive.Content, "rounded-lg border bg-card p-4 text-sm shadow-md")
export const DropdownMenuItem = styled(Primitive.Item, "flex cursor-default items-center gap-2 rounded px-2 py-1.5 outline-none data-[highlighted]:bg-muted")
export const DropdownMenuLabel = styled(Primitive.Label, "px-2 py-1 font-medium")
export const DropdownMenuSeparator = styled(Primitive.Separator, "my-1 h-px bg-border")
