import * as Primitive from "@radix-ui/react-navigation-menu"
import { styled } from "@/lib/styled"

export const NavigationMenu = styled(Primitive.Root, "relative")
export const NavigationMenuList = styled(Primitive.List, "flex gap-1")
export const NavigationMenuItem = Primitive.Item
export const NavigationMenuLink = styled(Primitive.Link, "rounded px-3 py-1.5 text-sm hover:bg-muted")
