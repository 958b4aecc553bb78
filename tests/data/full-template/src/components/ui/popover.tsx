import * as Primitive from "@radix-ui/react-popover"
import { styled } from "@/lib/styled"

export const Popover = Primitive.Root
export const PopoverTrigger = Primitive.Trigger
export const PopoverContent = styled(Primitive.Content, "rounded-lg border bg-card p-4 text-sm shadow-md")
