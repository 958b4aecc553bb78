import * as Primitive from "react-resizable-panels"
import { styled } from "@/lib/styled"

export const ResizableGroup = styled(Primitive.PanelGroup, "rounded-lg border")
export const ResizablePanel = styled(Primitive.Panel, "p-4 text-sm")
export const ResizableHandle = styled(Primitive.PanelResizeHandle, "w-px bg-border")
