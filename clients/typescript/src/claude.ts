/**
 * Claude's Agent SDK in a tenant: options that give an agent the tenant's tools and nothing of this host.
 *
 * The SDK runs Claude Code's CLI on this host with all its built-in tools off; the tenant's tools take their names.
 * Statements about the CLI here hold for version 2.1.332. The MCP server is in this process, rather than the gateway's
 * own, for three reasons: the tools have the names that the model knows, output can be shown while a command runs, and
 * the token is not in the CLI's arguments, which every user of this host can read.
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
/** Above the maximum of Bash in the foreground, 600 s, so that its own answer comes first. */
const TOOL_TIMEOUT = 660_000;
/** How long a call continues after its connection broke: enough to reconnect, but an agent may also have been killed. */
const LINGER = 5_000;

const REFUSED = {
  tools: "the CLI's own tools run on this host, and take precedence over the tenant's of the same name",
  toolAliases: "the tenant's tools have the names that the model knows",
  settingSources: "settings of this host can run commands on it",
  settings: "settings of this host can run commands on it",
  managedSettings: "settings of this host can run commands on it",
  projectConfigRoot: "settings of this host can run commands on it",
  additionalDirectories: "an agent in a tenant must not reach folders of this host",
  plugins: "plugins run on this host",
  skills: "skills are files of this host",
  strictMcpConfig: "servers of this host's configuration would be added",
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
  /** Gets the output of Bash while it runs; a slow function slows down the command. Needs the scope `events`. */
  readonly onOutput?: OnOutput | undefined;
  /** Your system prompt; a sentence about where the tools work follows it. */
  readonly systemPrompt?: string | undefined;
  /** The project's folder, for the model; default `/srv/site`. */
  readonly workspace?: string | undefined;
  /** A call that takes longer is cancelled, with all that it runs; default 660 000. */
  readonly toolTimeoutMs?: number | undefined;
  /** How long a call outlives this process or its connection; default 5 000. */
  readonly lingerMs?: number | undefined;
  /**
   * Keeps even the CLI's description of this host out of the conversation; default true. Then there are no sub-agents
   * and no hooks, and only ANTHROPIC_API_KEY is used. With false the model sees the CLI's working directory and
   * platform, and is told that the prompt's description of the container is what counts.
   */
  readonly bare?: boolean | undefined;
  /**
   * Lets the CLI store the conversation in the user's folder on this host, so that it can be resumed; default false.
   * It then also stores each image that is read there, and tells the model its path.
   */
  persistSession?: boolean;
}

/**
 * Returns options for the SDK's `query`: the tenant's eight tools, and nothing of this host.
 *
 * All other options are the SDK's. Sub-agents in `agents` get the same tools. Throws `TypeError` for options that would
 * expose this host. The result may be used for several queries, one after another.
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
    throw new TypeError("only a stored session can be resumed: set persistSession: true, also at its start");
  if (more.mcpServers !== undefined && SERVER in more.mcpServers)
    throw new TypeError(`the name "${SERVER}" is taken by the tenant's own tools`);
  if (systemPrompt !== undefined && typeof systemPrompt !== "string")
    throw new TypeError("systemPrompt must be a text: the SDK's presets describe the CLI's own tools");
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
    // the SDK uses these instead of the process's environment
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
