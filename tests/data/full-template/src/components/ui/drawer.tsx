import { Drawer as Primitive } from "vaul"
import { styled } from "@/lib/styled"

export const Drawer = Primitive.Root
export const DrawerTrigger = Primitive.Trigger
export const DrawerPortal = Primitive.Portal
export const DrawerContent = styled(Primitive.Content, "fixed inset-x-0 bottom-0 rounded-t-2xl border bg-card p-6")
export const DrawerTitle = styled(Primitive.Title, "font-semibold")
