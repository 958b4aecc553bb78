import { defineConfig } from "vitest/config";

export default defineConfig({
  resolve: {
    alias: { "@incus-gateway/client": new URL("../typescript/src/index.ts", import.meta.url).pathname },
  },
  test: {
    include: ["tests/**/*.test.{ts,tsx}"],
    environment: "happy-dom",
    setupFiles: ["fake-indexeddb/auto"],
  },
});
