import devServer from "@hono/vite-dev-server"
import tailwindcss from "@tailwindcss/vite"
import react from "@vitejs/plugin-react"
import { defineConfig } from "vite"

export default defineConfig({
  plugins: [
    react(),
    tailwindcss(),
    // requests under /api go to the Hono app, everything else to the page
    devServer({ entry: "server/api.ts", exclude: [/^\/(?!api\/).*/], injectClientScript: false }),
  ],
  resolve: { alias: { "@": `${import.meta.dirname}/src` } },
  server: {
    host: "0.0.0.0",
    port: Number(process.env.PORT ?? 5173),
    strictPort: true,
  },
})
