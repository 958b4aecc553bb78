/** What a program has of the package as it is installed. */

import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { freePort } from "./live.js";
import { HERE, installed } from "./packed.js";

const folder = mkdtempSync(join(tmpdir(), "gateway-client-"));
let client: string;

beforeAll(() => {
  client = installed(folder);
  writeFileSync(join(folder, "package.json"), JSON.stringify({ type: "module", private: true }));
  writeFileSync(join(folder, "program.ts"), PROGRAM);
});
afterAll(() => rmSync(folder, { recursive: true }));

const PROGRAM = `
import { Gateway, GatewayError, type Exec, type ToolResult } from "@incus-gateway/client";

declare const given: string | undefined;
export async function main(): Promise<void> {
  const gateway = new Gateway("http://127.0.0.1:8080", { token: given });
  using shop = gateway.tenant("shop", { session: given });
  const signal = AbortSignal.timeout(1000);
  const read: ToolResult = await shop.read("a", { limit: 1, signal });
  await using command: Exec = await shop.exec(["ls", read.text], { signal });
  await command.stdout.readable.pipeTo(new WritableStream());
  for await (const { data } of command.output()) data.byteLength;
  if (new GatewayError("gone", "").code === "gone") await gateway.deploy({ domain: "a", template: new Uint8Array() });
}
`;

test("depends on nothing, and only asks for what may be there", () => {
  const text = readFileSync(join(client, "package.json"), "utf8");
  const { dependencies, peerDependenciesMeta } = JSON.parse(text);
  expect(dependencies).toBeUndefined();
  for (const each of Object.values(peerDependenciesMeta)) expect(each).toEqual({ optional: true });
});

const dom = { lib: ["es2022", "dom", "dom.iterable", "dom.asynciterable"], types: [] };
test.each([
  { name: "a browser's bundler", ...dom, module: "esnext", moduleResolution: "bundler" },
  { name: "Node without the DOM", lib: ["es2022"], types: ["node"], module: "nodenext" },
])("has types for $name that are checked too", ({ name: _, ...options }) => {
  rmSync(join(folder, "node_modules/@types"), { force: true });
  if (options.types.length > 0) {
    for (const own of ["@types", "undici-types"]) rmSync(join(folder, "node_modules", own), { force: true });
    for (const own of ["@types", "undici-types"])
      symlinkSync(join(HERE, "node_modules", own), join(folder, "node_modules", own));
  }
  const strict = { strict: true, exactOptionalPropertyTypes: true, skipLibCheck: false, noEmit: true };
  const config = { compilerOptions: { target: "es2022", ...strict, ...options }, files: ["program.ts"] };
  writeFileSync(join(folder, "tsconfig.json"), JSON.stringify(config));
  const words = [join(HERE, "node_modules/typescript/bin/tsc"), "-p", folder];
  expect(spawnSync("node", words, { encoding: "utf8" }).stdout).toBe("");
});

test("says at once, and with the address, that nobody answers", async () => {
  symlinkSync(join(HERE, "node_modules/ws"), join(folder, "node_modules/ws"));
  const port = await freePort();
  const program = `
    import { Gateway } from "@incus-gateway/client";
    const gateway = new Gateway("http://127.0.0.1:${port}", { token: "x" });
    const shop = gateway.tenant("shop");
    const asking = [() => shop.connect(), () => shop.exec("true"), () => shop.watch(), () => shop.read("a"),
      () => shop.files.read("a"), () => gateway.tenants(), () => gateway.events().next()];
    for (const ask of asking) await ask().catch((error) => console.log(error.name, error.message));
  `;
  writeFileSync(join(folder, "dead.js"), program);
  const { stdout, stderr } = spawnSync("node", ["dead.js"], {
    cwd: folder,
    encoding: "utf8",
    timeout: 10_000,
  });
  const why = `no gateway answers at http://127.0.0.1:${port}: connect ECONNREFUSED 127.0.0.1:${port}`;
  expect([stdout.trimEnd().split("\n"), stderr]).toEqual([Array(7).fill(`Disconnected ${why}`), ""]);
});
