import * as Primitive from "@radix-ui/react-menubar"
import { styled } from "@/lib/styled"

export const Menubar = styled(Primitive.Root, "inline-flex gap-1 rounded-lg border p-1")
export const MenubarMenu = Primitive.Menu
export const MenubarTrigger = styled(Primitive.Trigger, "rounded px-2 py-1 text-sm data-[state=open]:bg-muted")
export const MenubarContent = styled(Primitive.Content, "rounded-lg border bg-card p-4 text-sm shadow-md")
export const MenubarItem = styled(Primitive.Item, "flex cursor-default items-center gap-2 rounded px-2 py-1.5 outline-none data-[highlighted]:bg-muted")
