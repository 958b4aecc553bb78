import { styled } from "@/lib/styled"

export const Card = styled("section", "rounded-2xl border bg-card p-6 shadow-xs")
export const CardTitle = styled("h2", "font-semibold")
export const CardDescription = styled("p", "mt-1 text-sm text-muted-foreground")
