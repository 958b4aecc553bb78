import { Command as Primitive } from "cmdk"
import { styled } from "@/lib/styled"

export const Command = styled(Primitive, "rounded-lg border bg-card text-sm")
export const CommandInput = styled(Primitive.Input, "w-full border-b bg-transparent p-2 outline-none")
export const CommandList = styled(Primitive.List, "max-h-40 overflow-auto p-1")
export const CommandItem = styled(Primitive.Item, "rounded px-2 py-1 data-[selected=true]:bg-muted")
export const CommandEmpty = styled(Primitive.Empty, "p-2 text-muted-foreground")
