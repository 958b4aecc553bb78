import { styled } from "@/lib/styled"

export const Badge = styled("span", "inline-flex rounded-full border px-2 py-0.5 text-xs")
