import { zodResolver } from "@hookform/resolvers/zod"
import { useForm } from "react-hook-form"
import { z } from "zod"
import { Button } from "@/components/ui/button"
import { Input } from "@/components/ui/input"
import { Label } from "@/components/ui/label"

const Contact = z.object({ email: z.email() })

export function ContactForm({ onSend }: { onSend: (email: string) => void }) {
  const form = useForm({ resolver: zodResolver(Contact), defaultValues: { email: "" } })
  return (
    <form onSubmit={form.handleSubmit(({ email }) => onSend(email))} className="flex items-end gap-2">
      <div className="grid gap-1">
        <Label htmlFor="email">Email</Label>
        <Input id="email" {...form.register("email")} />
      </div>
      <Button type="submit">Send</Button>
    </form>
  )
}
