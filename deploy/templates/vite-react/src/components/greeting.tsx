import { Send } from "lucide-react"
import { useState, type FormEvent } from "react"
import { Button } from "@/components/ui/button"
import { Card, CardDescription, CardTitle } from "@/components/ui/card"
import { Input } from "@/components/ui/input"

/** A form that asks the API and shows the answer. */
export function Greeting() {
  const [name, setName] = useState("")
  const [message, setMessage] = useState("")

  async function greet(event: FormEvent) {
    event.preventDefault()
    const response = await fetch(`/api/hello/${encodeURIComponent(name.trim() || "world")}`)
    setMessage(((await response.json()) as { message: string }).message)
  }

  return (
    <Card>
      <CardTitle>Say hello</CardTitle>
      <CardDescription>A round trip through your own API.</CardDescription>
      <form onSubmit={greet} className="mt-5 flex gap-2">
        <Input aria-label="Name" placeholder="Your name" value={name} onChange={(e) => setName(e.target.value)} />
        <Button type="submit" size="icon" aria-label="Send">
          <Send />
        </Button>
      </form>
      <p aria-live="polite" className="mt-3 h-5 text-sm font-medium text-primary">
        {message}
      </p>
    </Card>
  )
}
