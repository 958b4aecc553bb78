import * as Primitive from "@radix-ui/react-switch"
import { styled } from "@/lib/styled"

export const Switch = styled(Primitive.Root, "inline-flex h-5 w-9 rounded-full bg-muted p-0.5 data-[state=checked]:bg-primary")
export const SwitchThumb = styled(Primitive.Thumb, "size-4 rounded-full bg-card transition data-[state=checked]:translate-x-4")
