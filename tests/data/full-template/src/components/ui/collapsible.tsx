import * as Primitive from "@radix-ui/react-collapsible"
import { styled } from "@/lib/styled"

export const Collapsible = Primitive.Root
export const CollapsibleTrigger = styled(Primitive.Trigger, "font-medium")
export const CollapsibleContent = styled(Primitive.Content, "text-sm")
