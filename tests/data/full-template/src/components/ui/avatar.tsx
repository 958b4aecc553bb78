import * as Primitive from "@radix-ui/react-avatar"
import { styled } from "@/lib/styled"

export const Avatar = styled(Primitive.Root, "inline-flex size-9 overflow-hidden rounded-full")
export const AvatarImage = styled(Primitive.Image, "size-full")
export const AvatarFallback = styled(Primitive.Fallback, "flex size-full items-center justify-center bg-muted text-xs")
