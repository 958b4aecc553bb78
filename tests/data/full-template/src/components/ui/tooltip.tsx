import * as Primitive from "@radix-ui/react-tooltip"
import { styled } from "@/lib/styled"

export const TooltipProvider = Primitive.Provider
export const Tooltip = Primitive.Root
export const TooltipTrigger = Primitive.Trigger
export const TooltipContent = styled(Primitive.Content, "rounded-lg border bg-card p-4 text-sm shadow-md")
