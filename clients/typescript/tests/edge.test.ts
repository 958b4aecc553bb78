/** The package in edge runtimes: Vercel's, and Cloudflare's. Bundled as their builders do it, with nothing of Node. */

import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { EdgeVM } from "@edge-runtime/vm";
import { build, type Rolldown } from "vite";
import { afterAll, beforeAll, expect, test } from "vitest";
import workerd from "workerd";
import { freePort, LiveGateway } from "./live.js";
import { HERE, installed } from "./packed.js";

const folder = mkdtempSync(join(tmpdir(), "gateway-edge-"));
const live = new LiveGateway();
let worker: ChildProcess | undefined;

beforeAll(async () => {
  installed(folder);
  await live.start("demo");
});
afterAll(async () => {
  worker?.kill();
  await live.remove();
  rmSync(folder, { recursive: true });
});

/** Makes one script of tests/edge.js and the package. */
async function bundled(format: "es" | "iife", more: string): Promise<string> {
  const entry = join(folder, "entry.js");
  writeFileSync(entry, readFileSync(join(HERE, "tests/edge.js"), "utf8") + more);
  const lib = { entry, formats: [format], name: "edge" };
  const settings = { root: folder, configFile: false, logLevel: "error" } as const;
  const made = await build({ ...settings, build: { write: false, lib, minify: false, target: "es2022" } });
  const [output] = made as Rolldown.RolldownOutput[];
  return output?.output[0].code ?? "";
}

const FOUND = {
  read: expect.stringContaining("Hello ✓"),
  stdout: "as typed",
  exit: 3,
  slow: "cancelled",
  event: "tool.finished",
  size: 1 << 20,
  tenants: ["demo"],
  ran: "by HTTP\n",
};

test("works in Vercel's", async () => {
  const runtime = new EdgeVM({ initialCode: await bundled("iife", "") });
  const said = await runtime.evaluate(
    `edge.used(${JSON.stringify(live.url)}, ${JSON.stringify(live.token("demo"))}).then(JSON.stringify)`,
  );
  expect(JSON.parse(said)).toEqual(FOUND);
});

const HANDLER = `
export default {
  async fetch(request, { URL, TOKEN }) {
    try {
      return Response.json(await used(URL, TOKEN));
    } catch (error) {
      return new Response(error.stack, { status: 500 });
    }
  },
};
`;

test.each(["2026-10-01", "2023-12-01"])("works in Cloudflare's as of %s", async (date) => {
  writeFileSync(join(folder, "worker.js"), await bundled("es", HANDLER));
  const port = await freePort();
  writeFileSync(
    join(folder, "config.capnp"),
    `using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [(name = "main", worker = .main), (name = "internet", network = (allow = ["private"]))],
  sockets = [(name = "http", address = "127.0.0.1:${port}", http = (), service = "main")],
);
const main :Workerd.Worker = (
  modules = [(name = "worker", esModule = embed "worker.js")],
  bindings = [(name = "URL", text = "${live.url}"), (name = "TOKEN", text = "${live.token("demo")}")],
  compatibilityDate = "${date}",
);
`,
  );
  worker = spawn(workerd, ["serve", "config.capnp", "--control-fd=3"], {
    cwd: folder,
    stdio: ["ignore", "inherit", "inherit", "pipe"],
  });
  await once(worker.stdio[3] as NodeJS.ReadableStream, "data"); // it listens
  const answer = await fetch(`http://127.0.0.1:${port}`);
  const said = await answer.text();
  expect(answer.status, said).toBe(200);
  expect(JSON.parse(said)).toEqual(FOUND);
  worker.kill();
});
