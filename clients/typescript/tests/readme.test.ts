/** The TypeScript examples of the README and of docs/clients.md, as they stand there, against a live gateway. */

import { readFile, rm, writeFile } from "node:fs/promises";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { LiveGateway } from "./live.js";

const live = new LiveGateway();
const PROGRAM = new URL("./readme.example.ts", import.meta.url);

beforeAll(() => live.start("demo", "shop"));
afterAll(async () => {
  await rm(PROGRAM, { force: true });
  await live.remove();
});

/** Runs the example of a page, with some of its words replaced, and returns what it logs. */
async function run(page: string, words: Readonly<Record<string, string>>): Promise<unknown[][]> {
  const text = await readFile(new URL(`../../../${page}`, import.meta.url), "utf8");
  let [, program] = /```ts\n(.*?)```/s.exec(text) ?? [];
  const all = {
    "@incus-gateway/client": "../src/index.js",
    "http://127.0.0.1:8080": live.url,
    ...words,
  };
  for (const [word, other] of Object.entries(all)) {
    expect(program).toContain(word);
    program = program?.replace(word, () => other);
  }
  await writeFile(PROGRAM, `${program}\nexport {};\n`);
  const log = vi.spyOn(console, "log").mockImplementation(() => {});
  try {
    await import(`${PROGRAM.pathname}?${page}`);
    return log.mock.calls;
  } finally {
    log.mockRestore();
  }
}

test("the README's example writes a file and runs a command", async () => {
  const printed = await run("README.md", { TOKEN: JSON.stringify(live.token("demo")) });
  const text = printed.map(([stream, data]) => (stream === "stdout" ? data : "")).join("");
  expect(text).toMatch(/^Hello\nhello.txt\n/);
  expect(printed.at(-1)?.[0]).toMatchObject({ code: 0, reason: "exited" });
});

test("the example of docs/clients.md runs a command and tells its end", async () => {
  const printed = await run("docs/clients.md", {
    "process.env.TOKEN": JSON.stringify(live.token("shop")),
    "bun run build": "echo built; echo wrong >&2; exit 3", // there is no Bun on plain processes
  });
  expect(printed.slice(0, -1).sort()).toEqual([
    ["stderr", "wrong\n"],
    ["stdout", "built\n"],
  ]);
  expect(printed.at(-1)?.[0]).toMatchObject({ code: 3, reason: "exited" });
});
