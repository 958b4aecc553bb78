import { styled } from "@/lib/styled"

export const Textarea = styled("textarea", "rounded-lg border bg-card p-3 text-sm")
