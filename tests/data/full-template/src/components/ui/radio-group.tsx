import * as Primitive from "@radix-ui/react-radio-group"
import { styled } from "@/lib/styled"

export const RadioGroup = styled(Primitive.Root, "grid gap-2")
export const RadioGroupItem = styled(Primitive.Item, "size-4 rounded-full border")
export const RadioGroupIndicator = styled(Primitive.Indicator, "block size-2 rounded-full bg-primary")
