import { useEffect, useState } from "react"
import { Card, CardDescription, CardTitle } from "@/components/ui/card"

type Status = { uptime: number; memory: number; runtime: string }

/** Asks the API every few seconds and shows what the server says of itself. */
export function LiveStatus() {
  const [status, setStatus] = useState<Status | null>(null)

  useEffect(() => {
    const abort = new AbortController()
    const load = () =>
      fetch("/api/status", { signal: abort.signal })
        .then((response) => response.json() as Promise<Status>)
        .then(setStatus)
        .catch(() => !abort.signal.aborted && setStatus(null))
    void load()
    const timer = setInterval(load, 3000)
    return () => {
      abort.abort()
      clearInterval(timer)
    }
  }, [])

  const facts = [
    ["Running for", status ? `${status.uptime} s` : "…"],
    ["Memory", status ? `${status.memory} MB` : "…"],
    ["Runtime", status ? status.runtime : "…"],
  ]
  return (
    <Card>
      <div className="flex items-center justify-between">
        <CardTitle>Live from the API</CardTitle>
        <span className="relative flex size-2.5" title={status ? "answering" : "waiting"}>
          {status && <span className="absolute size-full animate-ping rounded-full bg-emerald-500/60" />}
          <span className={`size-2.5 rounded-full ${status ? "bg-emerald-500" : "bg-muted-foreground"}`} />
        </span>
      </div>
      <CardDescription>
        From <code>server/api.ts</code>, a Hono app beside the page.
      </CardDescription>
      <dl className="mt-5 grid grid-cols-3 gap-4">
        {facts.map(([label, value]) => (
          <div key={label}>
            <dt className="text-xs text-muted-foreground">{label}</dt>
            <dd className="mt-1 text-sm font-semibold tabular-nums">{value}</dd>
          </div>
        ))}
      </dl>
    </Card>
  )
}
