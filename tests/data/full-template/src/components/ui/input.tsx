import { styled } from "@/lib/styled"

export const Input = styled("input", "h-9 rounded-lg border bg-card px-3 text-sm")
