import type { ComponentProps } from "react"
import { DayPicker } from "react-day-picker"

export function Calendar(props: ComponentProps<typeof DayPicker>) {
  return <DayPicker showOutsideDays {...props} />
}
