/**
 * Claude's Agent SDK in a tenant: options that give an agent the tenant's tools and nothing of this host.
 *
 * The SDK runs Claude Code's CLI on this host with all of its own tools off; the tenant's tools take their names and
 * places. What is said of the CLI here was seen with its version 2.1.332. The server is one in this process and not
 * the gateway's own MCP address: only so have the tools the names that the model knows, can output be shown while a
 * command runs, and does no token stand in the CLI's arguments, which every user of this host can read.
 */

import type {
  AgentDefinition,
  McpSdkServerConfigWithInstance,
  Options,
} from "@anthropic-ai/claude-agent-sdk";
import { type OnOutput, ToolServer } from "./claude-server.js";
import type { Tenant } from "./tenant.js";

export type { OnOutput, Printed } from "./claude-server.js";

const SERVER = "tenant";
/** Over the longest that Bash takes in front, 600 s, so that its own answer comes first. */
const TOOL_TIMEOUT = 660_000;
/** For how long a call goes on whose connection broke: long enough to come back, and an agent may be killed. */
const LINGER = 5_000;

const REFUSED = {
  tools: "the CLI's own tools run on this host, and win over the tenant's of the same name",
  toolAliases: "the tenant's tools have the names that the model knows",
  settingSources: "settings of this host can run commands on it",
  settings: "settings of this host can run commands on it",
  managedSettings: "settings of this host can run commands on it",
  projectConfigRoot: "settings of this host can run commands on it",
  additionalDirectories: "folders of this host are no business of an agent in a tenant",
  plugins: "plugins run on this host",
  skills: "skills are files of this host",
  strictMcpConfig: "servers of this host's own configuration would be there too",
  verbatimPrompts: "an @path in a prompt would read a file of this host",
} as const;
const ENVIRONMENT = {
  // the tools appear as Read and Bash rather than as mcp__tenant__Read: the names that the model knows
  CLAUDE_AGENT_SDK_MCP_NO_PREFIX: "1",
  CLAUDE_CODE_DISABLE_FILE_MENTIONS: "1",
  CLAUDE_CODE_DISABLE_CLAUDE_MDS: "1",
  CLAUDE_CODE_DISABLE_AUTO_MEMORY: "1",
};
const OF_KEPT = ["resume", "continue", "forkSession", "sessionStore"] as const;

export interface ClaudeOptions extends Omit<Options, keyof typeof REFUSED | "systemPrompt"> {
  /** Given what Bash prints while it runs; who is slow there slows the command. Needs a token with scope `events`. */
  readonly onOutput?: OnOutput | undefined;
  /** Yours; where the tools work is said after it. */
  readonly systemPrompt?: string | undefined;
  /** What the model is told of the place of the project; `/srv/site` where left out. */
  readonly workspace?: string | undefined;
  /** A call that takes longer is given up, with all that it runs; 660 000 where left out. */
  readonly toolTimeoutMs?: number | undefined;
  /** How long a call outlives this process or its connection; 5 000 where left out. */
  readonly lingerMs?: number | undefined;
  /**
   * Keeps even the CLI's descriptions of this host out of the conversation; true where left out. Then there are no
   * sub-agents and no hooks, and the key is taken from ANTHROPIC_API_KEY alone. With false the model is told the CLI's working
   * directory and platform, and that the prompt's words about the container count.
   */
  readonly bare?: boolean | undefined;
  /**
   * Has the CLI keep the conversation in the user's folder on this host, so that it can be resumed; false where left
   * out. Then it keeps each image that is read there too, and tells the model under which path.
   */
  persistSession?: boolean;
}

/**
 * Returns options for the SDK's `query`: the tenant's eight tools, and nothing of this host.
 *
 * The rest are the SDK's own. Sub-agents of `agents` get the same tools. Throws `TypeError` for options that would
 * open this host. They may be used for one `query` after another.
 */
export function claudeOptions(tenant: Tenant, options: ClaudeOptions = {}): Options {
  for (const [name, why] of Object.entries(REFUSED)) {
    if ((options as Record<string, unknown>)[name] !== undefined)
      throw new TypeError(`${name} cannot be set for an agent in a tenant: ${why}`);
  }
  const {
    onOutput,
    systemPrompt,
    workspace = "/srv/site",
    toolTimeoutMs = TOOL_TIMEOUT,
    lingerMs = LINGER,
    bare = true,
    persistSession = false,
    ...more
  } = options;
  for (const name of ["hooks", "agents"] as const) {
    if (bare && more[name] !== undefined)
      throw new TypeError(`${name} need bare: false; the CLI has none in its bare mode`);
  }
  if (!persistSession && OF_KEPT.some((name) => more[name]))
    throw new TypeError("only what was kept can be resumed: set persistSession: true, there and here");
  if (more.mcpServers !== undefined && SERVER in more.mcpServers)
    throw new TypeError(`the name "${SERVER}" is taken by the tenant's own tools`);
  if (systemPrompt !== undefined && typeof systemPrompt !== "string")
    throw new TypeError("systemPrompt is a text here: the SDK's presets tell of the CLI's own tools");
  const place = prompt(workspace);
  const server = {
    type: "sdk",
    name: SERVER,
    timeout: toolTimeoutMs,
    instance: new ToolServer(tenant, { onOutput, lingerMs }),
  };
  return {
    cwd: "/", // no folder of a user's: its name would be told to the model
    ...more,
    ...(more.agents === undefined ? {} : { agents: bounded(more.agents) }),
    tools: more.agents === undefined ? [] : ["Agent"],
    mcpServers: { ...more.mcpServers, [SERVER]: server as unknown as McpSdkServerConfigWithInstance },
    strictMcpConfig: true,
    settingSources: [],
    skills: [],
    allowedTools: [...(more.allowedTools ?? []), `mcp__${SERVER}`],
    systemPrompt: systemPrompt === undefined ? place : `${systemPrompt}\n\n${place}`,
    verbatimPrompts: true,
    persistSession,
    // the SDK takes these in the place of the process's own
    env: { ...(more.env ?? process.env), ...ENVIRONMENT },
    extraArgs: { ...more.extraArgs, ...(bare ? { bare: null } : {}) },
  };
}

function prompt(workspace: string): string {
  return (
    "Your tools work in a Linux container, not on the machine that you are invoked on: where you are told of " +
    `another working directory or platform, this one counts. The project lies in ${workspace}, which is the ` +
    "working directory. Read, Write, Edit, Glob and Grep reach the files below it; Bash runs there as the user " +
    "that owns them."
  );
}

/** Sub-agents have the tools of the agent, by the same names. */
function bounded(agents: Record<string, AgentDefinition>): Record<string, AgentDefinition> {
  for (const [name, { memory, skills }] of Object.entries(agents)) {
    if (memory !== undefined || skills !== undefined)
      throw new TypeError(`the agent "${name}" cannot have memory or skills: they are files of this host`);
  }
  return agents;
}
