import react from "@vitejs/plugin-react-swc";
import { defineConfig } from "vite";

const port = Number(process.env.PORT) || 3000;
export default defineConfig({
  plugins: [react()],
  server: { host: "::", port, allowedHosts: [".example.com"], proxy: { "/api": `http://localhost:${port + 1000}` } },
});
