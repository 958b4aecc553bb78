import * as Primitive from "@radix-ui/react-select"
import { styled } from "@/lib/styled"

export const Select = Primitive.Root
export const SelectTrigger = styled(Primitive.Trigger, "inline-flex h-9 items-center gap-2 rounded-lg border px-3 text-sm")
export const SelectValue = Primitive.Value
export const SelectPortal = Primitive.Portal
export const SelectContent = styled(Primitive.Content, "rounded-lg border bg-card p-4 text-sm shadow-md")
export const SelectViewport = Primitive.Viewport
export const SelectItem = styled(Primitive.Item, "flex cursor-default items-center gap-2 rounded px-2 py-1.5 outline-none data-[highlighted]:bg-muted")
export const SelectItemText = Primitive.ItemText
