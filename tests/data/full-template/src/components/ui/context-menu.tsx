import * as Primitive from "@radix-ui/react-context-menu"
import { styled } from "@/lib/styled"

export const ContextMenu = Primitive.Root
export const ContextMenuTrigger = Primitive.Trigger
export const ContextMenuContent = styled(Primitive.Content, "rounded-lg border bg-card p-4 text-sm shadow-md")
export const ContextMenuItem = styled(Primitive.Item, "flex cursor-default items-center gap-2 rounded px-2 py-1.5 outline-none data-[highlighted]:bg-muted")
