import { Hono } from "hono"

const started = Date.now()
const app = new Hono().basePath("/api")

const routes = app
  .get("/health", (c) => c.json({ status: "ok" }))
  .get("/status", (c) => {
    const memory = process.memoryUsage()
    return c.json({
      uptime: Math.round((Date.now() - started) / 1000),
      memory: Math.round(memory.rss / 1024 / 1024),
      runtime: process.versions.bun ? `Bun ${process.versions.bun}` : `Node ${process.versions.node}`,
    })
  })
  .get("/hello/:name", (c) => c.json({ message: `Hello, ${c.req.param("name")}!` }))

export type Api = typeof routes
export default app
