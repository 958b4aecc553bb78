import { readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { brotliCompressSync, constants, gzipSync } from "node:zlib";
import { defineConfig, type Plugin } from "vite";

const OUT = new URL("../../gateway/static", import.meta.url).pathname;
const CLIENT = new URL("../typescript/src", import.meta.url).pathname;

/** Puts a .br and a .gz beside every text that gains by it: the gateway sends what the browser takes. */
function compressed(): Plugin {
  let out = OUT;
  return {
    name: "compressed",
    apply: "build",
    configResolved(config) {
      out = resolve(config.root, config.build.outDir);
    },
    closeBundle() {
      for (const name of readdirSync(out, { recursive: true, encoding: "utf8" })) {
        const path = join(out, name);
        if (!/\.(js|css|svg)$/.test(name) || statSync(path).size < 1024) continue;
        const data = readFileSync(path);
        writeFileSync(`${path}.gz`, gzipSync(data, { level: 9 }));
        const quality = { [constants.BROTLI_PARAM_QUALITY]: constants.BROTLI_MAX_QUALITY };
        writeFileSync(`${path}.br`, brotliCompressSync(data, { params: quality }));
      }
    },
  };
}

export default defineConfig({
  plugins: [compressed()],
  resolve: { alias: { "@incus-gateway/client": `${CLIENT}/index.ts` } },
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: OUT,
    emptyOutDir: true,
    target: "es2023",
    // the content security policy lets styles and fonts come from files only
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rollupOptions: {
      output: {
        entryFileNames: "assets/[hash].js",
        chunkFileNames: "assets/[hash].js",
        assetFileNames: "assets/[hash][extname]",
      },
    },
  },
  server: {
    proxy: { "/v1": { target: process.env.GATEWAY_URL ?? "http://127.0.0.1:8080", ws: true } },
    fs: { allow: [".", CLIENT] },
  },
});
