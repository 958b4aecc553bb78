import { GatewayError, type GatewayEvent, type Tenant } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { render } from "preact";
import { act } from "preact/test-utils";
import { beforeEach, expect, test, vi } from "vitest";
import { Agent } from "../src/editor/state/agent.js";
import { session } from "../src/editor/state/session.js";
import type { Workspace } from "../src/editor/state/workspace.js";
import { AgentView } from "../src/editor/ui/agent.js";

const ann = { subject: "ann", scopes: ["exec"], tenants: ["shop"], expires: 2e9 } as never;
const tenant = {
  agentToken: async () => ({ token: "t-1", subject: "ann (agent)", scopes: ["exec"], expires: 2e9 }),
} as unknown as Tenant;
const asked = vi.fn<(url: string, init: RequestInit) => Promise<Response>>();

/** An answer that is written message by message. */
function stream() {
  const { readable, writable } = new TransformStream<Uint8Array, Uint8Array>();
  const writer = writable.getWriter();
  const say = (message: object) => writer.write(new TextEncoder().encode(`${JSON.stringify(message)}\n`));
  return {
    response: new Response(readable as never),
    say,
    end: () => writer.close(),
    cut: () => writer.abort(),
  };
}

beforeEach(() => {
  sessionStorage.clear();
  session.value = ann;
  asked.mockReset();
  vi.stubGlobal("fetch", asked);
});

async function answered(agent: InstanceType<typeof Agent>, prompt: string, ...messages: object[]) {
  const { response, say, end } = stream();
  asked.mockResolvedValueOnce(response);
  agent.draft.value = prompt;
  const over = agent.ask();
  await vi.waitFor(() => expect(asked).toHaveBeenCalled());
  for (const message of messages) await say(message);
  await end();
  await over;
}

const init = { type: "system", subtype: "init", session_id: "s-1" };
const hello = { type: "assistant", message: { content: [{ type: "text", text: "**Hello** <img src=x>" }] } };
const done = { type: "result", subtype: "success", is_error: false, session_id: "s-1" };

test("the agent is asked with a token for it alone, and again in the same conversation after a reload", async () => {
  const agent = new Agent(() => tenant, "shop");
  await answered(agent, "Hi", init, hello, done);
  const [url, request] = asked.mock.calls[0]!;
  expect(url).toBe("https://agents.example.com/run");
  expect(request).toMatchObject({ redirect: "error", credentials: "omit", referrerPolicy: "no-referrer" });
  expect(request.headers).toMatchObject({ Authorization: "Bearer t-1" });
  expect(JSON.parse(String(request.body))).toEqual({ tenant: "shop", prompt: "Hi" });
  agent.draft.value = "not sent";
  agent.dispose();
  expect(JSON.stringify(sessionStorage)).not.toContain("t-1");

  const again = new Agent(() => tenant, "shop");
  expect(again.said.value).toHaveLength(2);
  expect(again.draft.value).toBe("not sent");
  await answered(again, "More", init, hello, done);
  expect(JSON.parse(String(asked.mock.calls[1]![1].body))).toMatchObject({ prompt: "More", session: "s-1" });
  again.dispose();
  session.value = { ...(ann as object), subject: "bob" } as never;
  expect(new Agent(() => tenant, "shop").said.value, "another person's is not shown").toEqual([]);
});

test("a stream that breaks, a refusal and a session that has ended are told, and what is typed stays", async () => {
  const agent = new Agent(() => tenant, "shop");
  await answered(agent, "Hi", init, hello);
  expect(agent.said.value.at(-1)).toMatchObject({
    kind: "note",
    bad: true,
    text: expect.stringContaining("broke"),
  });
  asked.mockResolvedValueOnce(new Response('{"detail":"Too many agents work."}', { status: 429 }));
  agent.draft.value = "Again";
  await agent.ask();
  expect(agent.said.value.at(-1)).toMatchObject({ text: "Too many agents work." });
  asked.mockRejectedValueOnce(new TypeError("Failed to fetch"));
  agent.draft.value = "Again";
  await agent.ask();
  expect(agent.said.value.at(-1)).toMatchObject({ text: expect.stringContaining("cannot be reached") });
  const ended = new GatewayError("unauthorized", "this token has expired");
  const over = new Agent(() => ({ agentToken: () => Promise.reject(ended) }) as unknown as Tenant, "other");
  over.draft.value = "Kept";
  await over.ask();
  expect(over.draft.value).toBe("Kept");
  expect(over.said.value).toEqual([]);
});

test("it is seen working, and is stopped by a key", async () => {
  const agent = new Agent(() => tenant, "shop");
  const { response, say, cut } = stream();
  asked.mockImplementationOnce(async (_url, { signal: ending }) => {
    ending?.addEventListener("abort", () => void cut());
    return response;
  });
  const current = { name: "shop", agent, server: signal(null) } as unknown as Workspace;
  const host = document.createElement("div");
  document.body.append(host);
  act(() => render(<AgentView current={current} />, host));
  agent.draft.value = "Run it";
  const over = agent.ask();
  await vi.waitFor(() => expect(asked).toHaveBeenCalled());
  const call = { type: "tool_use", id: "c-1", name: "Bash", input: { command: "sleep 9" } };
  await say(init);
  await say({ type: "assistant", message: { content: [hello.message.content[0], call] } });
  await vi.waitFor(() => expect(host.querySelector(".prompt-state")?.textContent).toContain("Bash"));
  await vi.waitFor(() => expect(host.querySelector("strong")?.textContent).toBe("Hello"));
  expect(host.querySelectorAll("img")).toHaveLength(0);
  const event = (type: string, data: object) => ({ type, data }) as unknown as GatewayEvent;
  agent.take(event("tool.started", { callId: "c-1", exec: "x-1" }));
  agent.take(
    event("turn.committed", { turn: "f".repeat(40), by: "ann (agent)", files: 1, added: 2, removed: 0 }),
  );
  agent.take(event("turn.committed", { turn: "e".repeat(40), by: "ann", files: 1, added: 2, removed: 0 }));
  expect(agent.said.value.filter(({ kind }) => kind === "turn")).toHaveLength(1);
  expect(agent.said.value.find(({ kind }) => kind === "call")).toMatchObject({ exec: "x-1" });
  const box = host.querySelector("textarea")!;
  box.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  await over.catch(() => {});
  expect(agent.running.value).toBe(false);
  expect(agent.said.value.find(({ kind }) => kind === "call")).toMatchObject({ state: "stopped" });
  session.value = null;
});
