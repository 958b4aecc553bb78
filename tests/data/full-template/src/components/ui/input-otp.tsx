import { OTPInput } from "input-otp"

export function CodeInput({ length = 6 }: { length?: number }) {
  return (
    <OTPInput
      maxLength={length}
      render={({ slots }) => (
        <div className="flex gap-1">
          {slots.map((slot, index) => (
            <span key={index} className="flex size-8 items-center justify-center rounded border text-sm">
              {slot.char}
            </span>
          ))}
        </div>
      )}
    />
  )
}
