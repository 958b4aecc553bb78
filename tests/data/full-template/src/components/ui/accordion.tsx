import * as Primitive from "@radix-ui/react-accordion"
import { styled } from "@/lib/styled"

export const Accordion = styled(Primitive.Root, "divide-y")
export const AccordionItem = styled(Primitive.Item, "py-1")
export const AccordionTrigger = styled(Primitive.Trigger, "flex w-full py-2 text-left font-medium")
export const AccordionContent = styled(Primitive.Content, "pb-3 text-sm text-muted-foreground")
