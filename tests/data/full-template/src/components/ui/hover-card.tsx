import * as Primitive from "@radix-ui/react-hover-card"
import { styled } from "@/lib/styled"

export const HoverCard = Primitive.Root
export const HoverCardTrigger = styled(Primitive.Trigger, "underline")
export const HoverCardContent = styled(Primitive.Content, "rounded-lg border bg-card p-4 text-sm shadow-md")
