/** Each method of the client sends what tests/wire/calls.json says; Python's client is held by it too. */

import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { Deployment, Exec, Gateway, type SocketConstructor, Tenant, ToolResult } from "../src/index.js";

interface Call {
  class: "Client" | "Tenant" | "Files" | "Deployment" | "Exec";
  method: string | null;
  typescript?: string | null;
  args: unknown[];
  typescriptArgs?: unknown[];
  options?: Record<string, unknown>;
  typescriptOptions?: Record<string, unknown>;
  sends: Record<string, unknown>;
  answer?: unknown;
  live?: boolean;
}
const { calls } = JSON.parse(
  readFileSync(new URL("../../../tests/wire/calls.json", import.meta.url), "utf8"),
) as { calls: Call[] };

const camel = (name: string) => name.replace(/_(.)/g, (_, letter: string) => letter.toUpperCase());
const named = ({ method, typescript }: Call) => (typescript !== undefined ? typescript : camel(method ?? ""));

type Method = (...args: unknown[]) => Promise<unknown>;
const member = (object: unknown, name: string) => (object as Record<string, unknown>)[name];

/** A gateway that answers everything with `answer`, and what it was asked. */
function scripted(answer: unknown): { gateway: Gateway; sent: Record<string, unknown>[] } {
  const sent: Record<string, unknown>[] = [];
  class Socket {
    binaryType = "";
    readyState = 1;
    bufferedAmount = 0;
    onopen: (() => void) | null = null;
    onmessage: ((event: { data: string }) => void) | null = null;
    onerror = null;
    onclose = null;
    constructor() {
      queueMicrotask(() => this.onopen?.());
    }
    send(text: string): void {
      const { id, method, params } = JSON.parse(text);
      const { callId: _, ...rest } = params;
      if (method !== "initialize") sent.push({ [method]: rest });
      const result = method === "initialize" ? {} : answer;
      queueMicrotask(() => this.onmessage?.({ data: JSON.stringify({ jsonrpc: "2.0", id, result }) }));
    }
    close(): void {}
  }
  const fetching = async (url: string, { method, body, signal }: RequestInit) => {
    signal?.throwIfAborted();
    sent.push({
      [`${method} ${url.slice("http://gateway".length)}`]:
        body === undefined ? null : JSON.parse(String(body)),
    });
    return new Response(JSON.stringify(answer));
  };
  const options = { token: "t", WebSocket: Socket as unknown as SocketConstructor };
  const gateway = new Gateway("http://gateway", { ...options, fetch: fetching as typeof fetch });
  return { gateway, sent };
}

/** The method of a row, on objects of this gateway. */
function bound(call: Call, gateway: Gateway): Method {
  const tenant = gateway.tenant("shop");
  const deployment = new Deployment(gateway, { id: "d-1", tenant: "shop", state: "waiting" });
  const objects = { Client: gateway, Tenant: tenant, Files: tenant.files, Deployment: deployment, Exec };
  const path = (named(call) ?? "").split(".");
  const method = path.pop() ?? "";
  const object = path.reduce<unknown>(member, objects[call.class]) as Record<string, Method>;
  return async (...args) => {
    try {
      return await object[method]?.(...args);
    } finally {
      tenant.close();
    }
  };
}

const once = calls.filter((call) => !call.live && named(call) !== null);

test.each(once)("of $class: $method sends this", async (call) => {
  const { gateway, sent } = scripted(call.answer ?? {});
  const camels = Object.entries(call.options ?? {}).map(([name, value]) => [camel(name), value]);
  const options = call.typescriptOptions ?? Object.fromEntries(camels);
  const args = [...(call.typescriptArgs ?? call.args)];
  if (Object.keys(options).length > 0) args.push(options);
  await bound(call, gateway)(...args);
  expect(sent).toEqual([call.sends]);
});

test.each(once)("of $class: $method is not even begun under a signal that has aborted", async (call) => {
  // as the last argument, and as one of the options
  const ended = AbortSignal.abort();
  const signal = Object.assign(ended, { signal: ended });
  const refused: boolean[] = [];
  for (const more of [[], [undefined], [undefined, undefined]]) {
    const { gateway, sent } = scripted(call.answer ?? {});
    const given = call.typescriptArgs ?? call.args;
    const ending = bound(call, gateway)(...given, ...more, signal).catch((error) => error.code);
    refused.push((await ending) === "cancelled" && sent.length === 0);
  }
  expect(refused).toContain(true);
});

test("a renewal is not even begun under a signal that has aborted", async () => {
  const { gateway, sent } = scripted({});
  const renewing = gateway.tenant("shop").renew("next", AbortSignal.abort());
  await expect(renewing).rejects.toMatchObject({ code: "cancelled" });
  expect(sent).toEqual([]);
});

describe("every method is in the table", () => {
  const { files, history } = scripted({}).gateway.tenant("shop");
  test.each([
    ["Client", Gateway.prototype],
    ["Tenant", Tenant.prototype],
    ["Files", Object.getPrototypeOf(files)],
    ["history", Object.getPrototypeOf(history)],
    ["Deployment", Deployment.prototype],
  ] as const)("of %s", (name, prototype) => {
    const found = new Set<string>();
    for (let one = prototype as object; one !== Object.prototype; one = Object.getPrototypeOf(one))
      for (const method of Object.getOwnPropertyNames(one)) found.add(method);
    found.delete("constructor");
    const listed = calls.map((call) => ({ name: named(call) ?? "", of: call.class }));
    const own = listed.flatMap(({ name: each, of }) => {
      if (each.includes(".")) return each.startsWith(`${name}.`) ? [each.slice(name.length + 1)] : [];
      return of === name && each !== "" ? [each] : [];
    });
    expect(found).toEqual(new Set(own));
  });

  test("of a command", () => {
    for (const call of calls.filter((call) => call.class === "Exec")) {
      expect(Exec.prototype).toHaveProperty(named(call) ?? "");
    }
  });
});

test("a failure of a tool is thrown with its code, and an exit code is a result", async () => {
  const text = { type: "text", text: "File does not exist." };
  const missing = { content: [text], isError: true, structuredContent: { code: "not_found", path: "a" } };
  const read = scripted(missing).gateway.tenant("shop").read("a");
  await expect(read).rejects.toMatchObject({ code: "not_found", message: text.text, facts: { path: "a" } });
  const structuredContent = { exec: "e-1", status: "failed", exitCode: 3 };
  const failed = { content: [{ type: "text", text: "Exit code 3" }], isError: true, structuredContent };
  const shell = await scripted(failed).gateway.tenant("shop").bash("exit 3");
  expect(shell).toMatchObject({
    status: "failed",
    exitCode: 3,
    exec: "e-1",
    shellId: null,
    outputFile: null,
  });
  expect(shell).toBeInstanceOf(ToolResult);
  expect(shell.text).toBe("Exit code 3");
});

test("the last turn is undone, where there is one", async () => {
  const undone = { turn: { turn: "t-10" }, conflicts: [] };
  const { gateway, sent } = scripted({ turns: [{ turn: "t-9" }], ...undone });
  const listed = { "history/list": { limit: 1 } };
  expect(await gateway.tenant("shop").history.undo()).toMatchObject(undone);
  expect(sent).toEqual([listed, { "history/undo": { turn: "t-9" } }]);
  const empty = scripted({ turns: [] });
  expect(await empty.gateway.tenant("shop").history.undo()).toEqual({ turn: null, conflicts: [] });
  expect(empty.sent).toEqual([listed]);
});
