import * as Primitive from "@radix-ui/react-toast"
import { styled } from "@/lib/styled"

export const ToastProvider = Primitive.Provider
export const Toast = styled(Primitive.Root, "rounded-lg border bg-card p-4 text-sm shadow-md")
export const ToastTitle = styled(Primitive.Title, "font-medium")
export const ToastViewport = styled(Primitive.Viewport, "fixed right-4 bottom-4")
