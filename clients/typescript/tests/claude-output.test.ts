/** How a Bash call's live output is followed; the same with a real agent is in test_claude_typescript.py. */

import { expect, test } from "vitest";
import { LiveOutput } from "../src/claude-output.js";
import type { StreamName, Tenant } from "../src/index.js";
import { ToolResult } from "../src/tools.js";

/** Events and the end of a command's output, as they come over two connections. */
class Late {
  readonly #told: { type: string; data: object }[] = [];
  #wake = () => {};
  attached = 0;
  end = () => {};

  tell(type: string): Promise<void> {
    this.#told.push({ type, data: { exec: "x-1", callId: "toolu_1" } });
    this.#wake();
    return new Promise((heard) => setTimeout(heard));
  }

  async events() {
    const next = () =>
      new Promise<void>((wake) => {
        this.#wake = wake;
      });
    const told = this.#told;
    return (async function* () {
      for (;;) {
        const event = told.shift();
        if (event === undefined) await next();
        else yield event;
      }
    })();
  }

  async attach() {
    this.attached++;
    const ended = new Promise<void>((end) => {
      this.end = end;
    });
    async function* output(): AsyncGenerator<{ stream: StreamName; data: Uint8Array }> {
      yield { stream: "stdout", data: new TextEncoder().encode("once") };
      await ended;
    }
    return { output, detach: async () => {} };
  }
}

test.each([
  ["before the result", "while its output is delivered"],
  ["before the result", "after that"],
  ["while its output is delivered", "after that"],
  ["after that", "after that"],
])("what began %s and started %s is handed over once", async (began, started) => {
  const late = new Late();
  const printed: string[] = [];
  const live = new LiveOutput(late as unknown as Tenant, ({ data }) => {
    printed.push(new TextDecoder().decode(data));
  });
  await live.open();
  const tell = async (now: string) => {
    if (began === now) await late.tell("tool.started");
    if (started === now) await late.tell("exec.started");
  };
  live.expect("toolu_1");
  await tell("before the result");
  const result = new ToolResult([], false, { exec: "x-1", status: "completed" });
  const finished = live.finish("toolu_1", result);
  await tell("while its output is delivered");
  late.end();
  await finished;
  await tell("after that");
  live.forget("toolu_1");
  expect([printed, late.attached]).toEqual([["once"], 1]);
});
