import { defineConfig } from "vitest/config";

export default defineConfig({
  // in one process: each file would load all packages anew
  test: { include: ["tests/**/*.test.ts"], testTimeout: 60_000, hookTimeout: 60_000, isolate: false },
});
