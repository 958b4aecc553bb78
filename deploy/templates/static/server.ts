// Serves public/ with the right types; what is not there gets public/404.html.
import { join, normalize } from "node:path"

const root = join(import.meta.dir, "public")

Bun.serve({
  hostname: "0.0.0.0",
  port: Number(process.env.PORT ?? 3000),
  async fetch(request) {
    const asked = decodeURIComponent(new URL(request.url).pathname)
    const path = join(root, normalize(asked))
    if (path !== root && !path.startsWith(root + "/")) return new Response("Not found", { status: 404 })
    for (const name of [path, join(path, "index.html")]) {
      const file = Bun.file(name)
      if (await file.exists()) return new Response(file, { headers: { "Cache-Control": "no-cache" } })
    }
    return new Response(Bun.file(join(root, "404.html")), { status: 404 })
  },
  error: () => new Response("Bad request", { status: 400 }),
})
