/** What `claudeOptions` says to the SDK; what an agent then does is in tests/integration/test_claude_typescript.py. */

import { readFileSync } from "node:fs";
import { expect, test, vi } from "vitest";
import { claudeOptions } from "../src/claude.js";
import { Permissions } from "../src/claude-permissions.js";
import type { ToolServer } from "../src/claude-server.js";
import { Gateway } from "../src/index.js";

const tenant = new Gateway("http://127.0.0.1:1", { token: "t" }).tenant("demo");

test("what is the caller's own is kept, and what holds the host shut wins", () => {
  const given = claudeOptions(tenant, {
    model: "claude-opus-5",
    env: { A: "b", CLAUDE_CODE_DISABLE_CLAUDE_MDS: "0" },
  });
  expect(given).toMatchObject({
    model: "claude-opus-5",
    cwd: "/",
    tools: [],
    settingSources: [],
    skills: [],
  });
  expect(given).toMatchObject({ strictMcpConfig: true, verbatimPrompts: true, persistSession: false });
  expect(given.env).toEqual({
    A: "b",
    CLAUDE_AGENT_SDK_MCP_NO_PREFIX: "1",
    CLAUDE_CODE_DISABLE_FILE_MENTIONS: "1",
    CLAUDE_CODE_DISABLE_CLAUDE_MDS: "1",
    CLAUDE_CODE_DISABLE_AUTO_MEMORY: "1",
    XDG_CACHE_HOME: "/dev/null",
  });
  expect(given.allowedTools).toEqual(["mcp__tenant"]);
});

test.each([
  ["extraArgs", { tools: "default" }],
  ["extraArgs", { "mcp-config": "{}" }],
  ["permissionMode", "plan"],
  ["agents", { tester: { description: "d", prompt: "p" } }],
  ["disallowedTools", ["Read(secrets/**)"]],
  ["allowedTools", ["Bash(git"]],
])("%s %j is refused, and why", (name, value) => {
  expect(() => claudeOptions(tenant, { [name]: value })).toThrow(/cannot be (set|held)|bare: false|no rule/);
});

test("missing tools are reported, since the CLI goes on without them", async () => {
  const warned = vi.spyOn(console, "warn").mockImplementation(() => {});
  const { tenant: server } = claudeOptions(tenant).mcpServers ?? {};
  const { instance } = server as unknown as { instance: ToolServer };
  const answered = await new Promise<object>((send) => {
    const transport = { start: async () => {}, send: async (answer: object) => send(answer) };
    void instance.connect(transport).then(() => {
      const { onmessage } = transport as unknown as { onmessage: (message: object) => void };
      onmessage({ id: 1, method: "tools/list" });
    });
  });
  expect(answered).toMatchObject({
    error: { message: expect.stringContaining("no gateway answers at http://127.0.0.1:1") },
  });
  expect(warned.mock.calls.join()).toMatch(/none of the tenant's tools: no gateway answers/);
  warned.mockRestore();
});

const RULES: Record<"allowed" | "denied", [string, string, boolean][]> = JSON.parse(
  readFileSync("../../tests/data/claude_rules.json", "utf8"),
);

test.each(RULES.allowed)("the rule %j allows %j: %j", (rule, command, runs) => {
  const permissions = new Permissions([{ name: "Bash", part: rule }], [], undefined, "/plans");
  expect(permissions.allows("Bash", { command }, "default")).toBe(runs);
});

test.each(RULES.denied)("the rule %j denies %j: %j", (rule, command, denied) => {
  const permissions = new Permissions([], [{ name: "Bash", part: rule }], undefined, "/plans");
  expect(permissions.refusal("Bash", { command }) !== null).toBe(denied);
});

/** Each option of the SDK that is installed is passed on or refused: a newer one's until somebody has looked at it. */
test("no option of the SDK is unknown", () => {
  const folder = process.env.GATEWAY_TEST_AGENT_SDK ?? ".";
  const file = `${folder}/node_modules/@anthropic-ai/claude-agent-sdk/sdk.d.ts`;
  const types = readFileSync(file, "utf8").replaceAll("\r", "");
  const body = /export declare type Options = \{\n(.*?)\n\};/s.exec(types)?.[1] ?? "";
  const names = [...body.matchAll(/^ {4}(\w+)\??:/gm)].map(([, name]) => name ?? "");
  expect(names.length).toBeGreaterThan(50);
  const unknown = names.filter((name) => {
    try {
      claudeOptions(tenant, { bare: false, [name]: [] });
      return false;
    } catch (error) {
      return String(error).includes("does not know");
    }
  });
  expect(unknown).toEqual([]);
});

test.each([
  "tools",
  "settingSources",
  "additionalDirectories",
  "plugins",
  "skills",
  "settings",
  "executableArgs",
])("%s would expose the host", (name) => {
  expect(() => claudeOptions(tenant, { [name]: [] })).toThrow(`${name} cannot be set`);
});
