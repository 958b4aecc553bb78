import { createElement, type ComponentProps, type ElementType } from "react"
import { cn } from "@/lib/utils"

/** Returns a component that is another one with classes of its own; those that it is given win. */
export function styled<Base extends ElementType>(base: Base, classes: string) {
  return function Styled({ className, ...props }: ComponentProps<Base> & { className?: string }) {
    return createElement(base as ElementType, { ...props, className: cn(classes, className) })
  }
}
