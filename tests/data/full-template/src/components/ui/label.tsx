import * as Primitive from "@radix-ui/react-label"
import { styled } from "@/lib/styled"

export const Label = styled(Primitive.Root, "text-sm font-medium")
