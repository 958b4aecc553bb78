/** The tools for Vercel's `ai`: the real package and a scripted model, against a live gateway of plain processes. */

import { generateText, stepCountIs } from "ai";
import { MockLanguageModelV3 } from "ai/test";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { aiTools } from "../src/ai.js";
import { Gateway, type Tenant } from "../src/index.js";
import { example, run } from "./examples.js";
import { LiveGateway } from "./live.js";

const live = new LiveGateway();
let demo: Tenant;

beforeAll(async () => {
  await live.start("demo", "shop");
  demo = new Gateway(live.url, { token: live.token("demo") }).tenant("demo");
});
afterAll(async () => {
  demo.close();
  await live.remove();
});

const usage = {
  inputTokens: { total: 1, noCache: 1, cacheRead: 0, cacheWrite: 0 },
  outputTokens: { total: 1, text: 1, reasoning: 0 },
};

/** Returns a model that makes these calls, one a turn, and then says "done". */
function model(...calls: [name: string, input: object][]): MockLanguageModelV3 {
  let turn = 0;
  return new MockLanguageModelV3({
    doGenerate: async () => {
      const call = calls[turn++];
      const reason = call === undefined ? "stop" : "tool-calls";
      const content =
        call === undefined
          ? ({ type: "text", text: "done" } as const)
          : ({
              type: "tool-call",
              toolCallId: `call_${crypto.randomUUID()}`,
              toolName: call[0],
              input: JSON.stringify(call[1]),
            } as const);
      return { content: [content], finishReason: { unified: reason, raw: reason }, usage, warnings: [] };
    },
  });
}

test("a model writes, reads, sees an image, and is told of errors", async () => {
  const png =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==";
  await demo.files.write("dot.png", Uint8Array.from(Buffer.from(png, "base64")));
  const scripted = model(
    ["Write", { file_path: "a.txt", content: "one\n" }],
    ["Read", { file_path: "a.txt" }],
    ["Read", { file_path: "dot.png" }],
    ["Bash", { command: "echo out; exit 3" }],
  );
  const tools = await aiTools(demo);
  expect(Object.keys(tools).sort()).toEqual([
    "Bash",
    "BashOutput",
    "Edit",
    "Glob",
    "Grep",
    "KillShell",
    "Read",
    "Write",
  ]);
  const { text } = await generateText({ model: scripted, tools, prompt: "go", stopWhen: stepCountIs(9) });
  expect(text).toBe("done");
  const told = scripted.doGenerateCalls
    .at(-1)
    ?.prompt.flatMap((message) =>
      message.role === "tool"
        ? message.content.flatMap((part) => ("output" in part ? [part.output] : []))
        : [],
    );
  expect(told).toMatchObject([
    { type: "text", value: expect.stringContaining("created successfully at: a.txt") },
    { type: "text", value: "1\tone\n2\t" },
    { type: "content", value: [{ mediaType: "image/png" }] },
    { type: "error-text", value: "Exit code 3\nout" },
  ]);
});

test("an abort ends what a call runs", async () => {
  const ending = new AbortController();
  const scripted = model(["Bash", { command: "sleep 987" }]);
  const tools = await aiTools(demo);
  const asked = generateText({ model: scripted, tools, prompt: "go", abortSignal: ending.signal });
  const running = async () => (await demo.execs()).some((exec) => exec.state === "running");
  while (!(await running()));
  ending.abort();
  await asked.catch(() => {});
  while (await running());
});

test("the example of docs/clients.md works in the tenant, and prints what the model says last", async () => {
  const scripted = model(["Bash", { command: "echo blue > heading" }]);
  vi.stubGlobal("scripted", scripted);
  const printed = await run(example("aiTools("), {
    "http://127.0.0.1:8080": live.url,
    "process.env.TOKEN": JSON.stringify(live.token("shop")),
    "@incus-gateway/client/ai": "../src/ai.js",
    "{ model,": "{ model: scripted,",
  });
  vi.unstubAllGlobals();
  expect(printed).toEqual([["done"]]);
  using shop = new Gateway(live.url, { token: live.token("shop") }).tenant("shop");
  expect((await shop.files.read("heading")).text).toBe("blue\n");
});
