import { styled } from "@/lib/styled"

export const Alert = styled("div", "rounded-lg border p-4 text-sm")
export const AlertTitle = styled("h3", "font-medium")
