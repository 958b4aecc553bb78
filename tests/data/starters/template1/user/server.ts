// In development it listens on a port of its own, before Vite does on PORT; in production it serves the pages, too.
import { Hono } from "hono";
import { serveStatic } from "hono/bun";

const app = new Hono();
app.get("/api/health", (c) => c.json({ status: "ok" }));
if (process.env.NODE_ENV === "production") {
  app.use("/*", serveStatic({ root: "./dist" }));
}
export default { port: process.env.API_PORT ?? process.env.PORT, fetch: app.fetch };
