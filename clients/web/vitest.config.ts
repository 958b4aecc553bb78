import { defineConfig } from "vitest/config";

export default defineConfig({
  resolve: {
    alias: { "@incus-gateway/client": new URL("../typescript/src/index.ts", import.meta.url).pathname },
  },
  test: {
    include: ["tests/**/*.test.{ts,tsx}"],
    environment: "happy-dom",
    // a process and a DOM for each file took three quarters of the time; they share what modules keep, too
    isolate: false,
    testTimeout: 60_000, // of a busy machine
    setupFiles: ["fake-indexeddb/auto", "./tests/page.ts"],
  },
});
