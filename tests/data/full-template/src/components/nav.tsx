import { Menu, Moon } from "lucide-react"
import { useTheme } from "next-themes"
import { Avatar, AvatarFallback } from "@/components/ui/avatar"
import { Button } from "@/components/ui/button"
import { DropdownMenu, DropdownMenuContent, DropdownMenuItem, DropdownMenuTrigger } from "@/components/ui/dropdown-menu"
import { NavigationMenu, NavigationMenuItem, NavigationMenuLink, NavigationMenuList } from "@/components/ui/navigation-menu"
import { Separator } from "@/components/ui/separator"

export function Nav() {
  const { setTheme } = useTheme()
  return (
    <>
      <header className="flex items-center justify-between py-3">
        <NavigationMenu>
          <NavigationMenuList>
            <NavigationMenuItem>
              <NavigationMenuLink href="/">Home</NavigationMenuLink>
            </NavigationMenuItem>
          </NavigationMenuList>
        </NavigationMenu>
        <div className="flex items-center gap-2">
          <Button variant="ghost" size="small" aria-label="Dark" onClick={() => setTheme("dark")}>
            <Moon className="size-4" />
          </Button>
          <DropdownMenu>
            <DropdownMenuTrigger aria-label="Menu">
              <Menu className="size-4" />
            </DropdownMenuTrigger>
            <DropdownMenuContent>
              <DropdownMenuItem>Settings</DropdownMenuItem>
            </DropdownMenuContent>
          </DropdownMenu>
          <Avatar>
            <AvatarFallback>ME</AvatarFallback>
          </Avatar>
        </div>
      </header>
      <Separator />
    </>
  )
}
