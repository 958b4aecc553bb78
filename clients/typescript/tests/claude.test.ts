/** What `claudeOptions` says to the SDK; what an agent then does is in tests/integration/test_claude_typescript.py. */

import { expect, test } from "vitest";
import { claudeOptions } from "../src/claude.js";
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
  });
  expect(given.allowedTools).toEqual(["mcp__tenant"]);
});

test.each(["tools", "settingSources", "additionalDirectories", "plugins", "skills", "settings"])(
  "%s would expose the host",
  (name) => {
    expect(() => claudeOptions(tenant, { [name]: [] })).toThrow(`${name} cannot be set`);
  },
);
