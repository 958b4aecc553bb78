import { Slot } from "@radix-ui/react-slot"
import { cva, type VariantProps } from "class-variance-authority"
import type { ComponentProps } from "react"
import { cn } from "@/lib/utils"

const look = cva("inline-flex items-center justify-center gap-2 rounded-lg text-sm font-medium", {
  variants: {
    variant: { solid: "bg-primary text-primary-foreground", outline: "border bg-card", ghost: "hover:bg-muted" },
    size: { normal: "h-9 px-4", small: "h-8 px-3" },
  },
  defaultVariants: { variant: "solid", size: "normal" },
})

type Props = ComponentProps<"button"> & VariantProps<typeof look> & { asChild?: boolean }

export function Button({ className, variant, size, asChild, ...props }: Props) {
  const Component = asChild ? Slot : "button"
  return <Component className={cn(look({ variant, size }), className)} {...props} />
}
