import * as Primitive from "@radix-ui/react-progress"
import { styled } from "@/lib/styled"

export const Progress = styled(Primitive.Root, "h-2 overflow-hidden rounded-full bg-muted")
export const ProgressIndicator = styled(Primitive.Indicator, "h-full bg-primary")
