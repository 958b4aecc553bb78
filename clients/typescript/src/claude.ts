/**
 * Claude's Agent SDK in a tenant: options that give an agent the tenant's tools and nothing of this host.
 *
 * The SDK runs Claude Code's CLI on this host with all its built-in tools off; the tenant's tools take their names.
 * They have these names in permission rules and in `canUseTool` too. Statements about the CLI here hold for version
 * 2.1.333. The MCP server is in this process, rather than the gateway's
 * own, for three reasons: the tools have the names that the model knows, output can be shown while a command runs, and
 * the token is not in the CLI's arguments, which every user of this host can read.
 */

import type {
  AgentDefinition,
  McpSdkServerConfigWithInstance,
  Options,
} from "@anthropic-ai/claude-agent-sdk";
import { full, Permissions, plain, rules, SERVER, TOOLS, UNASKED } from "./claude-permissions.js";
import { type OnOutput, ToolServer } from "./claude-server.js";
import type { Tenant } from "./tenant.js";

export type { OnOutput, Printed } from "./claude-server.js";

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
  sandbox: "it is for commands on this host, and the agent runs none",
  additionalDirectories: "an agent in a tenant must not reach folders of this host",
  executableArgs: "arguments of the CLI can open this host",
  plugins: "plugins run on this host",
  skills: "skills are files of this host",
  strictMcpConfig: "servers of this host's configuration would be added",
  verbatimPrompts: "an @path in a prompt would read a file of this host",
} as const;
/**
 * The SDK's options that open nothing of this host, or are the caller's own program: an option that a newer SDK adds is
 * refused until somebody has looked at it.
 */
const PASSED = new Set(
  (
    "abortController agent agentProgressSummaries agents allowDangerouslySkipPermissions allowedTools betas canUseTool " +
    "continue cwd debug debugFile disallowedTools effort enableFileCheckpointing env executable extraArgs " +
    "fallbackModel forkSession forwardSubagentText hooks includeHookEvents includePartialMessages loadTimeoutMs " +
    "maxBudgetUsd maxThinkingTokens maxTurns mcpServers mcpServersDelivery model onElicitation onUserDialog " +
    "outputFormat pathToClaudeCodeExecutable perTaskStopAffordance permissionMode permissionPromptToolName " +
    "permissionPrompts planModeInstructions pluginDelivery promptSuggestions resume resumeDropsTurn resumeSessionAt " +
    "sessionId sessionStore sessionStoreFlush spawnClaudeCodeProcess stderr supportedDialogKinds taskBudget " +
    "thinking title toolConfig"
  ).split(" "),
);
/** The CLI's arguments that `extraArgs` may name: none of them turns on anything. */
const EXTRA_ARGS = ["debug-to-stderr", "replay-user-messages"];
const ENVIRONMENT = {
  // the tools appear as Read and Bash rather than as mcp__tenant__Read: the names that the model knows
  CLAUDE_AGENT_SDK_MCP_NO_PREFIX: "1",
  CLAUDE_CODE_DISABLE_FILE_MENTIONS: "1",
  CLAUDE_CODE_DISABLE_CLAUDE_MDS: "1",
  CLAUDE_CODE_DISABLE_AUTO_MEMORY: "1",
  // no folder: the CLI would log failed calls there, with their output
  XDG_CACHE_HOME: "/dev/null",
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
   * Keeps even the CLI's description of this host out of the conversation; default true. Then there are no sub-agents,
   * no hooks and no modes `plan` and `acceptEdits`, and only ANTHROPIC_API_KEY is used. With false the model sees the
   * CLI's working directory and platform, and the prompt says that those of the container apply.
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
 *
 * The tools run without a question until you say who decides, as in the CLI itself: by `canUseTool`, a
 * `permissionMode`, or rules in `allowedTools`. Then Read, Glob, Grep, BashOutput and KillShell alone do.
 * `disallowedTools` hold in any case. Rules have the tools' plain names: `Bash`, `Bash(git *)`.
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
    allowedTools = [],
    disallowedTools = [],
    extraArgs = {},
    ...more
  } = options;
  for (const [name, value] of Object.entries(more)) {
    if (value !== undefined && !PASSED.has(name))
      throw new TypeError(
        `${name} cannot be set for an agent in a tenant: this client does not know whether it would open this host`,
      );
  }
  for (const name of Object.keys(extraArgs)) {
    if (!EXTRA_ARGS.includes(name))
      throw new TypeError(
        `extraArgs "${name}" cannot be set for an agent in a tenant: the CLI's arguments can open this host, other ` +
          `than ${EXTRA_ARGS.join(" and ")}`,
      );
  }
  for (const name of ["hooks", "agents"] as const) {
    if (bare && more[name] !== undefined)
      throw new TypeError(`${name} need bare: false; the CLI has none in its bare mode`);
  }
  const { canUseTool, permissionMode: mode, permissionPromptToolName, permissionPrompts } = more;
  if (bare && (mode === "plan" || mode === "acceptEdits"))
    throw new TypeError(`permissionMode "${mode}" needs bare: false; bare mode does not have it`);
  if (!persistSession && OF_KEPT.some((name) => more[name]))
    throw new TypeError("only a stored session can be resumed: set persistSession: true, also at its start");
  if (more.mcpServers !== undefined && SERVER in more.mcpServers)
    throw new TypeError(`the name "${SERVER}" is taken by the tenant's own tools`);
  if (systemPrompt !== undefined && typeof systemPrompt !== "string")
    throw new TypeError("systemPrompt must be a text: the SDK's presets describe the CLI's own tools");
  // the SDK uses these instead of the process's environment
  const env = { ...(more.env ?? process.env) };
  const plans = `${env.CLAUDE_CONFIG_DIR || `${env.HOME ?? ""}/.claude`}/plans`;
  const allowed = rules(allowedTools);
  const permissions = new Permissions(allowed, rules(disallowedTools), canUseTool, plans);
  const whole = allowed.flatMap(({ name, part }) => (part === undefined ? [name] : []));
  const asking = canUseTool !== undefined || (permissions.allowed.length > 0 && !permissionPromptToolName);
  const said = canUseTool ?? mode ?? permissionPromptToolName ?? permissionPrompts;
  if (said === undefined && !allowed.some(({ name }) => TOOLS.includes(name))) whole.push(`mcp__${SERVER}`);
  // otherwise `ask` allows them
  else if (!asking || mode === "dontAsk" || permissionPrompts === "none") whole.push(...UNASKED);
  const place = prompt(workspace);
  // a conversation that goes on does so where Bash stands
  const begin = OF_KEPT.some((name) => more[name]) ? undefined : workspace;
  const server = {
    type: "sdk",
    name: SERVER,
    timeout: toolTimeoutMs,
    instance: new ToolServer(tenant, { onOutput, lingerMs, permissions, begin }),
  };
  return {
    cwd: "/", // no folder of a user's: the model would see its name
    ...more,
    ...(more.agents === undefined ? {} : { agents: bounded(more.agents) }),
    ...(asking ? { canUseTool: permissions.ask } : {}),
    ...(bare ? {} : { hooks: hooked(more.hooks, permissions) }),
    // those of the CLI that reach nothing of this host, for those who can use them
    tools: [
      ...(more.agents === undefined ? [] : ["Agent"]),
      ...(!bare && (canUseTool !== undefined || mode === "plan") ? ["AskUserQuestion", "ExitPlanMode"] : []),
    ],
    mcpServers: {
      ...cached(more.mcpServers, env),
      [SERVER]: server as unknown as McpSdkServerConfigWithInstance,
    },
    strictMcpConfig: true,
    settingSources: [],
    skills: [],
    // otherwise the CLI may choose `auto`, which never asks
    permissionMode: mode ?? "default",
    allowedTools: whole.map(full),
    disallowedTools: permissions.removed,
    systemPrompt: systemPrompt === undefined ? place : `${systemPrompt}\n\n${place}`,
    verbatimPrompts: true,
    persistSession,
    env: { ...env, ...ENVIRONMENT },
    extraArgs: { ...extraArgs, ...(bare ? { bare: null } : {}) },
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

function hooked(hooks: Options["hooks"], { before }: Permissions): Options["hooks"] & object {
  return { ...hooks, PreToolUse: [...(hooks?.PreToolUse ?? []), { hooks: [before] }] };
}

/** Gives the caller's own programs the cache that the CLI is kept from. */
function cached(servers: Options["mcpServers"] = {}, env: Options["env"] & object) {
  const cache = env.XDG_CACHE_HOME || `${env.HOME ?? ""}/.cache`;
  const entries = Object.entries(servers).map(([name, server]) => [
    name,
    "command" in server ? { ...server, env: { XDG_CACHE_HOME: cache, ...server.env } } : server,
  ]);
  return Object.fromEntries(entries) as typeof servers;
}

/** Sub-agents have the tools of the agent, by the same names. */
function bounded(agents: Record<string, AgentDefinition>): Record<string, AgentDefinition> {
  const entries = Object.entries(agents).map(([name, agent]) => {
    const { memory, skills, tools, disallowedTools } = agent;
    if (memory !== undefined || skills !== undefined)
      throw new TypeError(`the agent "${name}" cannot have memory or skills: they are files of this host`);
    const part = [...(tools ?? []), ...(disallowedTools ?? [])].find((rule) =>
      /^(?!Agent|Task)\w+\(/.test(rule),
    );
    if (part !== undefined)
      throw new TypeError(`the agent "${name}" can have or lack a tool, and not a part of it: ${part}`);
    const named = {
      ...(tools === undefined ? {} : { tools: tools.map(plain) }),
      ...(disallowedTools === undefined ? {} : { disallowedTools: disallowedTools.map(plain) }),
    };
    return [name, { ...agent, ...named }] as const;
  });
  return Object.fromEntries(entries);
}
