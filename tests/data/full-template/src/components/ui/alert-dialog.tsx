import * as Primitive from "@radix-ui/react-alert-dialog"
import { styled } from "@/lib/styled"

export const AlertDialog = Primitive.Root
export const AlertDialogTrigger = Primitive.Trigger
export const AlertDialogPortal = Primitive.Portal
export const AlertDialogOverlay = styled(Primitive.Overlay, "fixed inset-0 bg-black/40")
export const AlertDialogContent = styled(Primitive.Content, "fixed top-1/2 left-1/2 w-96 -translate-x-1/2 -translate-y-1/2 rounded-lg border bg-card p-4 text-sm shadow-md")
export const AlertDialogTitle = styled(Primitive.Title, "font-semibold")
export const AlertDialogDescription = styled(Primitive.Description, "text-muted-foreground")
export const AlertDialogAction = styled(Primitive.Action, "rounded bg-primary px-3 py-1.5 text-primary-foreground")
export const AlertDialogCancel = styled(Primitive.Cancel, "rounded border px-3 py-1.5")
