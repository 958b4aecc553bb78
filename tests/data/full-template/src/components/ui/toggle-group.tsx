import * as Primitive from "@radix-ui/react-toggle-group"
import { styled } from "@/lib/styled"

export const ToggleGroup = styled(Primitive.Root, "inline-flex gap-1")
export const ToggleGroupItem = styled(Primitive.Item, "rounded px-2 py-1 text-sm data-[state=on]:bg-muted")
