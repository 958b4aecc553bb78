import * as Primitive from "@radix-ui/react-separator"
import { styled } from "@/lib/styled"

export const Separator = styled(Primitive.Root, "h-px w-full bg-border")
