import { expect, test } from "vitest";
import { BrokenStream, messages } from "../src/editor/state/agent-stream.js";
import { Conversation } from "../src/editor/state/conversation.js";

const tool = (id: string, name: string, input: object) => ({ type: "tool_use", id, name, input });
const assistant = (...content: object[]) => ({ type: "assistant", message: { content }, session_id: "s1" });
const delta = (text: string) => ({
  type: "stream_event",
  event: { type: "content_block_delta", delta: { type: "text_delta", text } },
});
const returned = (id: string, content: unknown, is_error = false) => ({
  type: "user",
  message: { content: [{ type: "tool_result", tool_use_id: id, content, is_error }] },
});

test("a turn is shown as it happens: text that grows, calls with their results, the end", () => {
  const talk = new Conversation();
  talk.ask("Make it blue");
  expect(talk.take({ type: "system", subtype: "init", session_id: "s1" })).toBe(false);
  talk.take(delta("I will "));
  talk.take(delta("look."));
  expect(talk.said.at(-1)).toEqual({ kind: "text", text: "I will look.", live: true });
  talk.take(assistant({ type: "text", text: "I will look." }));
  expect(talk.said.at(-1)).toEqual({ kind: "text", text: "I will look.", live: false });
  talk.take({
    type: "stream_event",
    event: { type: "content_block_start", content_block: tool("t1", "mcp__tenant__Read", {}) },
  });
  expect(talk.said.at(-1)).toMatchObject({ kind: "call", name: "Read", what: "", state: "running" });
  talk.take(assistant(tool("t1", "Read", { file_path: "src/a.css" }), tool("t2", "Bash", { command: "ls" })));
  talk.runs("t2", "x-1");
  talk.take(returned("t1", "1\tred"));
  talk.take(returned("t2", [{ type: "text", text: "Exit code 1" }], true));
  expect(talk.said.slice(2)).toMatchObject([
    { id: "t1", path: "src/a.css", state: "done", said: "1\tred", exec: null },
    { id: "t2", what: "ls", state: "failed", said: "Exit code 1", exec: "x-1" },
  ]);
  expect(talk.take({ type: "result", subtype: "success", is_error: false, result: "done" })).toBe(true);
  expect(talk.session).toBe("s1");
  expect(talk.said).toHaveLength(4);
});

test.each([
  [{ subtype: "error_max_turns" }, "limit of steps"],
  [{ subtype: "error_during_execution", errors: ["the key is gone"] }, "the key is gone"],
  [{ subtype: "success", is_error: true, result: "API Error: 500" }, "API Error: 500"],
  [{ subtype: "error_during_execution", terminal_reason: "aborted_tools" }, "Stopped."],
])("an end that is none is told in plain words: %j", (end, words) => {
  const talk = new Conversation();
  talk.take(assistant(tool("t1", "Bash", { command: "sleep 9" })));
  talk.take({ type: "result", ...end });
  expect(talk.said[0]).toMatchObject({ state: "stopped" });
  expect(talk.said.at(-1)).toMatchObject({ kind: "note", text: expect.stringContaining(words) });
});

test("what a model or a server sends of any other shape breaks nothing", () => {
  const talk = new Conversation();
  const strange: object[] = [
    { type: "assistant" },
    { type: "assistant", message: { content: [null, 3, { type: "text", text: 5 }, tool("", "X", {})] } },
    assistant({ type: "tool_use", id: "t1", name: { a: 1 }, input: "text" }),
    { type: "user", message: { content: "words" } },
    { type: "stream_event", event: null },
    { type: "stream_event", event: { type: "content_block_start" } },
    { type: "result" },
    [],
  ];
  for (const message of strange) talk.take(message);
  for (let count = 0; count < 2000; count++) talk.take(assistant({ type: "text", text: "x".repeat(1000) }));
  talk.take(assistant({ type: "text", text: "y".repeat(1 << 20) }));
  expect(talk.said.length).toBeLessThanOrEqual(400);
  expect(JSON.stringify(talk.said.at(-1)).length).toBeLessThan(101_000);
});

async function read(...pieces: string[]): Promise<object[]> {
  const bytes = pieces.map((piece) => new TextEncoder().encode(piece));
  const found = [];
  const body = new ReadableStream<Uint8Array<ArrayBuffer>>({
    start(controller) {
      for (const piece of bytes) controller.enqueue(piece);
      controller.close();
    },
  });
  for await (const message of messages(body)) found.push(message);
  return found;
}

test("messages come by lines or by events, cut anywhere", async () => {
  const wanted = [{ a: "ä\n" }, { b: 2 }];
  const lines = `${JSON.stringify(wanted[0])}\n\n${JSON.stringify(wanted[1])}`;
  const events = `: hello\r\nevent: message\r\ndata: ${JSON.stringify(wanted[0])}\r\n\r\nid: 3\ndata: {"b":\ndata: 2}\n\n`;
  for (const text of [lines, events]) {
    expect(await read(text)).toEqual(wanted);
    expect(await read(...text)).toEqual(wanted);
  }
});

test("what is no such stream is told", async () => {
  await expect(read("<!doctype html>\n<p>Hello\n")).rejects.toThrow(BrokenStream);
  await expect(read("data: nothing\n\n")).rejects.toThrow(BrokenStream);
  await expect(read("{not JSON}\n")).rejects.toThrow(BrokenStream);
  const endless = Array.from({ length: 40 }, () => "x".repeat(1 << 20));
  await expect(read("data: ", ...endless)).rejects.toThrow("too long");
});
