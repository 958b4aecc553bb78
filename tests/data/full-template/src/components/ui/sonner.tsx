import { useTheme } from "next-themes"
import { Toaster as Primitive } from "sonner"

export function Toaster() {
  const { theme } = useTheme()
  return <Primitive theme={theme === "dark" ? "dark" : "light"} />
}
