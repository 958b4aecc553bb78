import { ArrowRight, Blocks, Braces, Palette, Zap } from "lucide-react"
import { Greeting } from "@/components/greeting"
import { LiveStatus } from "@/components/live-status"
import { Badge } from "@/components/ui/badge"
import { Button } from "@/components/ui/button"
import { Card, CardDescription, CardTitle } from "@/components/ui/card"
import { Tabs, TabsContent, TabsList, TabsTrigger } from "@/components/ui/tabs"

const features = [
  { icon: Zap, title: "Shows at once", text: "Save a file and the page changes, without a reload and without losing what you typed." },
  { icon: Palette, title: "Tailwind inside", text: "Colours and fonts are in src/index.css, light and dark alike." },
  { icon: Blocks, title: "Components you own", text: "Buttons, cards, tabs and inputs live in src/components/ui. Change them as you like." },
  { icon: Braces, title: "An API beside it", text: "server/api.ts is a Hono app on the same address. No CORS, no second server." },
]

const steps = [
  { value: "page", label: "The page", code: "src/app.tsx", text: "Start here: this very page. Replace it with yours." },
  { value: "api", label: "The API", code: "server/api.ts", text: "Add a route, then fetch it from the page under /api." },
  { value: "style", label: "The style", code: "src/index.css", text: "One place for colours. Every component follows." },
]

export function App() {
  return (
    <div className="relative isolate min-h-screen overflow-hidden">
      <div aria-hidden className="absolute inset-x-0 -top-48 -z-10 mx-auto h-96 max-w-3xl rounded-full bg-primary/20 blur-3xl" />
      <header className="mx-auto flex max-w-5xl items-center justify-between px-6 py-6">
        <a href="/" className="flex items-center gap-2.5 font-semibold tracking-tight">
          <img src="/icon.svg" alt="" className="size-7" /> Your site
        </a>
        <Button asChild variant="ghost" size="sm">
          <a href="#start">Start building</a>
        </Button>
      </header>

      <main className="mx-auto max-w-5xl px-6 pb-24">
        <section className="py-16 text-center sm:py-24">
          <Badge>
            <span className="size-1.5 rounded-full bg-emerald-500" /> Deployed, and yours to change
          </Badge>
          <h1 className="mx-auto mt-6 max-w-3xl text-5xl font-semibold tracking-tighter text-balance sm:text-7xl">
            Your site is live.
          </h1>
          <p className="mx-auto mt-6 max-w-xl text-lg leading-relaxed text-pretty text-muted-foreground">
            React, Tailwind and an API, running in a container of its own. Open a file, change a line, watch it happen here.
          </p>
          <div className="mt-9 flex flex-wrap justify-center gap-3">
            <Button asChild size="lg">
              <a href="#start">
                Make it yours <ArrowRight />
              </a>
            </Button>
            <Button asChild variant="outline" size="lg">
              <a href="/api/status">See the API</a>
            </Button>
          </div>
        </section>

        <section className="grid gap-4 md:grid-cols-2">
          <LiveStatus />
          <Greeting />
        </section>

        <section className="mt-4 grid gap-4 sm:grid-cols-2 lg:grid-cols-4">
          {features.map(({ icon: Icon, title, text }) => (
            <Card key={title}>
              <Icon aria-hidden className="mb-4 size-5 text-primary" />
              <CardTitle className="text-sm">{title}</CardTitle>
              <CardDescription>{text}</CardDescription>
            </Card>
          ))}
        </section>

        <section id="start" className="mt-20 scroll-mt-10 text-center">
          <h2 className="text-3xl font-semibold tracking-tight">Three files to know</h2>
          <Tabs defaultValue="page" className="mx-auto mt-6 max-w-lg">
            <TabsList>
              {steps.map(({ value, label }) => (
                <TabsTrigger key={value} value={value}>
                  {label}
                </TabsTrigger>
              ))}
            </TabsList>
            {steps.map(({ value, code, text }) => (
              <TabsContent key={value} value={value}>
                <Card>
                  <code className="rounded-md bg-muted px-2 py-1 text-sm font-medium">{code}</code>
                  <CardDescription className="mt-3">{text}</CardDescription>
                </Card>
              </TabsContent>
            ))}
          </Tabs>
        </section>
      </main>
    </div>
  )
}
