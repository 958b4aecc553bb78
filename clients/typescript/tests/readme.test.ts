/** The TypeScript examples of the README and of docs/clients.md, as they stand there, against a live gateway. */

import { afterAll, beforeAll, expect, test } from "vitest";
import { example, run } from "./examples.js";
import { LiveGateway } from "./live.js";

const live = new LiveGateway();

beforeAll(() => live.start("demo", "shop"));
afterAll(() => live.remove());

test("the README's example writes a file and runs a command", async () => {
  const printed = await run(example("new Gateway(", "README.md"), {
    "http://127.0.0.1:8080": live.url,
    TOKEN: JSON.stringify(live.token("demo")),
  });
  const text = printed.map(([stream, data]) => (stream === "stdout" ? data : "")).join("");
  expect(text).toMatch(/^Hello\nhello.txt\n/);
  expect(printed.at(-1)?.[0]).toMatchObject({ code: 0, reason: "exited" });
});

test("the example of docs/clients.md runs a command and tells its end", async () => {
  const printed = await run(example("bun run build"), {
    "http://127.0.0.1:8080": live.url,
    "process.env.TOKEN": JSON.stringify(live.token("shop")),
    "bun run build": "echo built; echo wrong >&2; exit 3", // there is no Bun on plain processes
  });
  expect(printed.slice(0, -1).sort()).toEqual([
    ["stderr", "wrong\n"],
    ["stdout", "built\n"],
  ]);
  expect(printed.at(-1)?.[0]).toMatchObject({ code: 3, reason: "exited" });
});
