import * as Primitive from "@radix-ui/react-toggle"
import { styled } from "@/lib/styled"

export const Toggle = styled(Primitive.Root, "rounded px-2 py-1 text-sm data-[state=on]:bg-muted")
