import * as Primitive from "@radix-ui/react-scroll-area"
import { styled } from "@/lib/styled"

export const ScrollArea = styled(Primitive.Root, "overflow-hidden")
export const ScrollAreaViewport = styled(Primitive.Viewport, "size-full")
export const ScrollAreaScrollbar = styled(Primitive.Scrollbar, "w-2")
export const ScrollAreaThumb = styled(Primitive.Thumb, "rounded bg-border")
