/** What a program has of the package as it is installed. */

import { spawnSync } from "node:child_process";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { example } from "./examples.js";
import { freePort } from "./live.js";
import { HERE, installed } from "./packed.js";

const folder = mkdtempSync(join(tmpdir(), "gateway-client-"));
let client: string;

beforeAll(() => {
  client = installed(folder);
  writeFileSync(join(folder, "package.json"), JSON.stringify({ type: "module", private: true }));
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

test("imports nothing by a name that bundlers cannot see, nor what may be missing", () => {
  const files = readdirSync(join(client, "dist")).filter((name) => name.endsWith(".js"));
  const dynamic = files.filter((name) =>
    /\bimport\s*\(/.test(readFileSync(join(client, "dist", name), "utf8")),
  );
  expect([files.length > 20, dynamic]).toEqual([true, []]);
});

/** Has the project nothing but these packages and what they ask for, as npm would install them. */
function have(...names: readonly string[]): void {
  const there = join(folder, "node_modules");
  for (const name of names) {
    const [from, to] = [join(HERE, "node_modules", name), join(there, name)];
    if (existsSync(to) || !existsSync(from)) continue;
    mkdirSync(dirname(to), { recursive: true });
    symlinkSync(from, to);
    const { dependencies, peerDependencies } = JSON.parse(readFileSync(join(from, "package.json"), "utf8"));
    have(...Object.keys({ ...dependencies, ...peerDependencies }));
  }
}

/** Returns what the compiler says of programs, and of the types of all packages that they use. */
function said(options: object, ...programs: readonly string[]): string {
  const files = programs.map((program, number) => {
    writeFileSync(join(folder, `program-${number}.ts`), program);
    return `program-${number}.ts`;
  });
  const checked = { strict: true, skipLibCheck: false, preserveSymlinks: true, noEmit: true };
  const config = { compilerOptions: { target: "es2022", ...checked, ...options }, files };
  writeFileSync(join(folder, "tsconfig.json"), JSON.stringify(config));
  const words = [join(HERE, "node_modules/typescript/bin/tsc"), "-p", "."];
  return spawnSync("node", words, { cwd: folder, encoding: "utf8" }).stdout;
}

const dom = ["es2022", "dom", "dom.iterable", "dom.asynciterable"];
const node = { module: "nodenext", types: ["node"] };
const exactly = { exactOptionalPropertyTypes: true };
const start = (reader: string) => example("new Gateway(", `docs/start/${reader}.md`);

describe("has types that are checked too, and so are the programs of the docs", { timeout: 180_000 }, () => {
  test("in a browser's bundler", () => {
    const bundled = { module: "esnext", moduleResolution: "bundler", types: [], lib: dom };
    expect(said({ ...bundled, ...exactly }, PROGRAM, start("browser"))).toBe("");
  });

  test("in Node without the DOM", () => {
    have("@types/node");
    const packing = `declare const gateway: import("@incus-gateway/client").Gateway;\n${example("packed(")}`;
    const renewing = `import { Gateway } from "@incus-gateway/client";\ndeclare const url: string;\n${example("/my/token")}`;
    const readme = `declare const TOKEN: string;\n${example("new Gateway(", "README.md")}`;
    const programs = [PROGRAM, packing, renewing, readme, example("bun run build")];
    expect(said({ ...node, lib: ["es2022"], ...exactly }, ...programs)).toBe("");
  });

  test("for Claude's Agent SDK", () => {
    have("@types/node", "@anthropic-ai/claude-agent-sdk");
    const programs = [example("claudeOptions("), start("typescript-agent")];
    expect(said({ ...node, lib: dom, ...exactly }, ...programs)).toBe("");
  });

  test("for Vercel's package, with what that needs itself", () => {
    have("@types/node", "@types/json-schema", "ai");
    const program = `declare const model: import("ai").LanguageModel;\n${example("aiTools(")}`;
    expect(said({ ...node, lib: dom }, program)).toBe("");
    // under this option its own types fail: ours do not
    const failing = said({ ...node, lib: dom, ...exactly }, program).match(/^\S+(?=\()/gm) ?? [];
    expect(failing.filter((file) => !/^node_modules\/(ai|@ai-sdk)\//.test(file))).toEqual([]);
  });
});

test("says at once, and with the address, that nobody answers", async () => {
  have("ws");
  const port = await freePort();
  const program = `
    import { Gateway } from "@incus-gateway/client";
    const gateway = new Gateway("http://127.0.0.1:${port}", { token: "x" });
    const shop = gateway.tenant("shop");
    const asking = [() => shop.connect(), () => shop.exec("true"), () => shop.watch(), () => shop.read("a"),
      () => shop.events(), () => shop.events(), () => shop.files.read("a"), () => gateway.tenants(),
      () => gateway.events().next()];
    for (const ask of asking) await ask().catch((error) => console.log(error.name, error.message));
  `;
  writeFileSync(join(folder, "dead.js"), program);
  const { stdout, stderr } = spawnSync("node", ["dead.js"], {
    cwd: folder,
    encoding: "utf8",
    timeout: 10_000,
  });
  const why = `no gateway answers at http://127.0.0.1:${port}: connect ECONNREFUSED 127.0.0.1:${port}`;
  expect([stdout.trimEnd().split("\n"), stderr]).toEqual([Array(9).fill(`Disconnected ${why}`), ""]);
});
