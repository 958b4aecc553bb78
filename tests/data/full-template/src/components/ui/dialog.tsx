import * as Primitive from "@radix-ui/react-dialog"
import { styled } from "@/lib/styled"

export const Dialog = Primitive.Root
export const DialogTrigger = Primitive.Trigger
export const DialogPortal = Primitive.Portal
export const DialogOverlay = styled(Primitive.Overlay, "fixed inset-0 bg-black/40")
export const DialogContent = styled(Primitive.Content, "fixed top-1/2 left-1/2 w-96 -translate-x-1/2 -translate-y-1/2 rounded-lg border bg-card p-4 text-sm shadow-md")
export const DialogTitle = styled(Primitive.Title, "font-semibold")
export const DialogDescription = styled(Primitive.Description, "text-muted-foreground")
export const DialogClose = styled(Primitive.Close, "absolute top-3 right-3")
