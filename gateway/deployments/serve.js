// Serves the files of a folder: `bun -e "$(cat serve.js)" FOLDER [spa]`, with PORT in the environment.
// A folder has its index.html, /about has about.html, what is not there 404.html. Names that begin with a dot
// are not served. With `spa` the page is one app: paths that are no file are its own, and answered by index.html.
const { join, resolve } = require("node:path");
const { statSync } = require("node:fs");

const root = resolve(process.argv[1] ?? ".");
const spa = process.argv[2] === "spa";
// what a page loads rather than shows; the names of others may have a dot, as in /users/jane.doe
const LOADED =
  /\.(?:[cm]?js|css|map|json|wasm|txt|xml|ico|png|jpe?g|gif|svg|webp|avif|woff2?|[ot]tf|mp[34]|webm|pdf|zip|webmanifest)$/i;
const kind = (path) => {
  const found = statSync(path, { throwIfNoEntry: false });
  return found?.isFile() ? "file" : found?.isDirectory() ? "folder" : undefined;
};
const send = (path, status = 200) =>
  new Response(Bun.file(path), { status, headers: { "Cache-Control": "no-cache" } });
const missing = () => {
  const page = join(root, "404.html");
  return kind(page) === "file" ? send(page, 404) : new Response("Not found\n", { status: 404 });
};

Bun.serve({
  hostname: "0.0.0.0",
  port: process.env.PORT,
  fetch(request) {
    if (request.method !== "GET" && request.method !== "HEAD")
      return new Response("Only GET and HEAD\n", { status: 405, headers: { Allow: "GET, HEAD" } });
    const { pathname, search } = new URL(request.url);
    const parts = decodeURIComponent(pathname).split(/[/\\]/);
    const hidden = (part) => part.startsWith(".") && part !== ".well-known";
    if (parts.some((part) => hidden(part) || part.includes("\0"))) return missing();
    const path = join(root, ...parts);
    if (path === join(root, "site.toml")) return missing();
    if (kind(path) === "file" && !pathname.endsWith("/")) return send(path);
    if (kind(path) === "folder" && kind(join(path, "index.html")) === "file")
      return pathname.endsWith("/")
        ? send(join(path, "index.html"))
        : new Response(null, { status: 302, headers: { Location: `${parts.at(-1)}/${search}` } });
    if (!pathname.endsWith("/") && kind(`${path}.html`) === "file") return send(`${path}.html`);
    const accept = request.headers.get("Accept") || "*/*";
    const index = join(root, "index.html");
    if (spa && !LOADED.test(path) && /text\/html|\*\/\*/.test(accept) && kind(index) === "file") return send(index);
    return missing();
  },
  error: () => new Response("Bad request\n", { status: 400 }),
});
