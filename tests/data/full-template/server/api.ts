import { Hono } from "hono"

const started = Date.now()

export default new Hono()
  .basePath("/api")
  .get("/health", (c) => c.json({ status: "ok" }))
  .get("/status", (c) => c.json({ uptime: Math.round((Date.now() - started) / 1000) }))
