/** The README's TypeScript example, as it stands there, against a live gateway. */

import { readFile, rm, writeFile } from "node:fs/promises";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { LiveGateway } from "./live.js";

const live = new LiveGateway();
const README = new URL("../../../README.md", import.meta.url);
const PROGRAM = new URL("./readme.example.ts", import.meta.url);

beforeAll(() => live.start("demo"));
afterAll(async () => {
  await rm(PROGRAM, { force: true });
  await live.remove();
});

test("the README's example writes a file and runs a command", async () => {
  const [, example] = /```ts\n(.*?)```/s.exec(await readFile(README, "utf8")) ?? [];
  const program = example
    ?.replace("@incus-gateway/client", "../src/client/index.js")
    .replace("http://127.0.0.1:8080", live.url)
    .replace("TOKEN", JSON.stringify(live.token("demo")));
  await writeFile(PROGRAM, `${program}\nexport {};\n`);
  const log = vi.spyOn(console, "log").mockImplementation(() => {});
  await import(PROGRAM.pathname);
  const printed = log.mock.calls;
  log.mockRestore();
  const text = printed.map(([stream, data]) => (stream === "stdout" ? data : "")).join("");
  expect(text).toMatch(/^Hello\nhello.txt\n/);
  expect(printed.at(-1)?.[0]).toMatchObject({ code: 0, reason: "exited" });
});
