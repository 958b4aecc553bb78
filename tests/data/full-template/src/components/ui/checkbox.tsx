import * as Primitive from "@radix-ui/react-checkbox"
import { styled } from "@/lib/styled"

export const Checkbox = styled(Primitive.Root, "size-4 rounded border data-[state=checked]:bg-primary")
export const CheckboxIndicator = styled(Primitive.Indicator, "block")
