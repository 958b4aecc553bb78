import * as Primitive from "@radix-ui/react-tabs"
import { styled } from "@/lib/styled"

export const Tabs = Primitive.Root
export const TabsList = styled(Primitive.List, "inline-flex gap-1 rounded-lg bg-muted p-1")
export const TabsTrigger = styled(Primitive.Trigger, "rounded px-3 py-1 text-sm data-[state=active]:bg-card")
export const TabsContent = styled(Primitive.Content, "mt-3")
