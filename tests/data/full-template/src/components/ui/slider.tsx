import * as Primitive from "@radix-ui/react-slider"
import { styled } from "@/lib/styled"

export const Slider = styled(Primitive.Root, "relative flex h-4 items-center")
export const SliderTrack = styled(Primitive.Track, "relative h-1 grow rounded bg-muted")
export const SliderRange = styled(Primitive.Range, "absolute h-full rounded bg-primary")
export const SliderThumb = styled(Primitive.Thumb, "block size-4 rounded-full border bg-card")
