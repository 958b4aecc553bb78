/**
 * Who decides about an agent's call: rules and modes here where the CLI knows none for MCP's tools, then a person.
 *
 * The CLI does not match a part of an MCP tool (`Bash(git *)`), nor does it know which of them edit files.
 */

import type {
  CanUseTool,
  HookCallback,
  PermissionResult,
  PermissionUpdate,
} from "@anthropic-ai/claude-agent-sdk";

export const SERVER = "tenant";
export const TOOLS = ["Bash", "BashOutput", "Edit", "Glob", "Grep", "KillShell", "Read", "Write"];
/** What the CLI does without asking, in its working directory. */
export const UNASKED = ["Read", "Glob", "Grep", "BashOutput", "KillShell"];

type Given = Record<string, unknown>;
interface Rule {
  readonly name: string;
  readonly part?: string | undefined;
}
/** What a call is answered with that no tenant is asked about. */
export interface Instead {
  readonly text: string;
  readonly isError: boolean;
}

const RULE = /([^\s,()]+)(?:\(((?:\\.|[^\\()])*)\))?(?:[\s,]+|$)/y;

/** The name that the CLI's rules have for a tool. */
export const full = (name: string): string => (TOOLS.includes(name) ? `mcp__${SERVER}__${name}` : name);

export function plain(name: string): string {
  const rest = name.startsWith(`mcp__${SERVER}__`) ? name.slice(`mcp__${SERVER}__`.length) : name;
  return TOOLS.includes(rest) ? rest : name;
}

/** Names and parts as the CLI reads them: an entry may hold several. Throws `TypeError`. */
export function rules(entries: readonly string[]): Rule[] {
  const found: Rule[] = [];
  for (const entry of entries) {
    const text = entry.trim();
    RULE.lastIndex = 0;
    while (RULE.lastIndex < text.length) {
      const rule = RULE.exec(text);
      if (rule === null) throw new TypeError(`this is no rule of a permission: "${entry}"`);
      const [whole, written = "", part] = rule;
      const name = plain(written);
      if (part !== undefined && !TOOLS.includes(name)) found.push({ name: `${name}(${part})` });
      else if (part === undefined || isWhole(part)) found.push({ name });
      else if (name === "Bash") found.push({ name, part });
      else
        throw new TypeError(
          `${whole.trim()} cannot be held in a tenant: name the whole tool, or decide in canUseTool`,
        );
    }
  }
  return found;
}

const isWhole = (part: string) => ["", "*", ":*"].includes(part);

export class Permissions {
  readonly #person: CanUseTool | undefined;
  readonly #plans: string;
  readonly #written = new Map<string, string>();
  readonly allowed: string[];
  readonly denied: string[];
  /** The tools that there are none of, by the names of the CLI's rules. */
  readonly removed: string[];

  constructor(
    allowed: readonly Rule[],
    disallowed: readonly Rule[],
    person: CanUseTool | undefined,
    plans: string,
  ) {
    this.#person = person;
    this.#plans = plans;
    const parts = (of: readonly Rule[]) => of.flatMap(({ part }) => (part === undefined ? [] : [part]));
    this.allowed = parts(allowed);
    this.denied = parts(disallowed);
    this.removed = disallowed.filter(({ part }) => part === undefined).map(({ name }) => full(name));
  }

  /** Why a call must not run, even if it is allowed elsewhere. */
  refusal(name: string, { command }: Given): string | null {
    if (name !== "Bash" || typeof command !== "string") return null;
    const parts = [...anyParts(command)];
    const rule = this.denied.find((rule) => parts.some((part) => matches(rule, part)));
    return rule === undefined ? null : `Permission to use Bash with ${rule} has been denied.`;
  }

  /** Whether a call may run without asking. */
  allows(name: string, given: Given, mode: string): boolean {
    if (UNASKED.includes(name) || this.#isPlan(name, given)) return true;
    if (name === "Edit" || name === "Write") return mode === "acceptEdits";
    if (name !== "Bash") return false;
    const parts = plainParts(String(given.command));
    return parts.length > 0 && parts.every((part) => this.allowed.some((rule) => matches(rule, part)));
  }

  /** A hook, which is the only one to hear of the mode that holds now. */
  readonly before: HookCallback = async (event) => {
    if (event.hook_event_name !== "PreToolUse") return {};
    const { tool_name, tool_input, permission_mode = "default" } = event;
    if (!this.allows(plain(tool_name), (tool_input ?? {}) as Given, permission_mode)) return {};
    return { hookSpecificOutput: { hookEventName: "PreToolUse", permissionDecision: "allow" } };
  };

  readonly ask: CanUseTool = async (called, given, options): Promise<PermissionResult | null> => {
    const name = plain(called);
    const refusal = this.refusal(name, given);
    if (refusal !== null) return { behavior: "deny", message: refusal };
    if (this.allows(name, given, "default")) return { behavior: "allow", updatedInput: given };
    if (this.#person === undefined) {
      const message = `Claude requested permissions to use ${name}, but you haven't granted it yet.`;
      return { behavior: "deny", message };
    }
    const plan = [...this.#written.values()].at(-1);
    const shown = name === "ExitPlanMode" && plan !== undefined ? { ...given, plan } : given;
    const suggestions = options.suggestions?.map((update) => renamed(update, plain));
    const answer = await this.#person(name, shown, {
      ...options,
      ...(suggestions === undefined ? {} : { suggestions }),
    });
    if (answer?.behavior !== "allow") return answer;
    const { updatedInput: input, updatedPermissions: updates } = answer;
    return {
      ...answer,
      // the CLI would keep a plan that it is given on this host
      ...(input !== undefined && "plan" in input && input.plan === plan ? { updatedInput: given } : {}),
      ...(updates === undefined ? {} : { updatedPermissions: this.#updated(updates) }),
    };
  };

  /** Keeps what only we can hold; the rest is the CLI's for this session, and nothing of this host. */
  #updated(updates: readonly PermissionUpdate[]): PermissionUpdate[] {
    const kept: PermissionUpdate[] = [];
    for (const update of updates) {
      if (update.type === "addDirectories" || update.type === "removeDirectories") continue;
      if (update.type === "setMode") {
        kept.push({ ...update, destination: "session" });
        continue;
      }
      const whole = update.rules.filter(({ toolName, ruleContent: part }) => {
        if (plain(toolName) !== "Bash" || part === undefined || isWhole(part)) return true;
        const held = update.behavior === "deny" ? this.denied : this.allowed;
        if (update.type === "removeRules") held.splice(0, held.length, ...held.filter((one) => one !== part));
        else if (update.behavior !== "ask") held.push(part);
        return false;
      });
      if (whole.length > 0) kept.push(renamed({ ...update, rules: whole, destination: "session" }, full));
    }
    return kept;
  }

  // --- the plan: a file of the CLI's on this host, which the model writes with the tenant's tools ---

  #isPlan(name: string, { file_path: path }: Given): boolean {
    if (!["Edit", "Read", "Write"].includes(name) || typeof path !== "string") return false;
    return path.startsWith(`${this.#plans}/`) && !path.slice(this.#plans.length + 1).includes("/");
  }

  /** Answers a call about the plan, which is kept here; null for any other call. */
  planned(name: string, given: Given): Instead | null {
    if (!this.#isPlan(name, given)) return null;
    const path = String(given.file_path);
    const text = this.#written.get(path);
    if (name === "Write") {
      this.#written.set(path, String(given.content));
      return { text: `File created successfully at: ${path}`, isError: false };
    }
    if (text === undefined) return { text: "File does not exist.", isError: true };
    if (name === "Read") {
      const lines = text.split("\n").map((line, index) => `${index + 1}\t${line}`);
      return { text: lines.join("\n"), isError: false };
    }
    const [before, after, ...more] = text.split(String(given.old_string));
    if (after === undefined || more.length > 0)
      return { text: "The plan must hold old_string exactly once.", isError: true };
    this.#written.set(path, `${before}${given.new_string}${after}`);
    return { text: `The file ${path} has been updated successfully.`, isError: false };
  }
}

function renamed<Update extends PermissionUpdate>(update: Update, name: (name: string) => string): Update {
  if (!("rules" in update)) return update;
  const rules = update.rules.map((rule) => ({ ...rule, toolName: name(rule.toolName) }));
  return { ...update, rules };
}

/** Whether a command is what a rule says: `git *` and `git:*` are git with any words or none. */
export function matches(rule: string, command: string): boolean {
  const written = rule.endsWith(":*") ? `${rule.slice(0, -2)} *` : rule;
  const [head, alone] = written.endsWith(" *") ? [written.slice(0, -2), "( .*)?"] : [written, ""];
  const pattern = head
    .split("*")
    .map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"))
    .join(".*");
  return new RegExp(`^${pattern}${alone}$`, "s").test(command.trim().split(/\s+/).join(" "));
}

/** The simple commands of a line of which nothing is hidden; empty if anything might be. */
export function plainParts(command: string): string[] {
  const quoted = command.replace(/'[^']*'|"[^"$`\\!]*"/g, (found) => "q".repeat(found.length));
  if (/[$`\\<>(){}'"#!]/.test(quoted)) return [];
  const parts: string[] = [];
  let at = 0;
  for (const { 0: separator, index } of quoted.matchAll(/[;&|\n]+|$/g)) {
    const part = command.slice(at, index).trim();
    if (part !== "") parts.push(part);
    at = index + separator.length;
  }
  return parts;
}

/** Programs and words of the shell behind which a command stands. */
const RUNS = new Set(
  (
    "bash builtin command dash do doas else env exec eval if ionice nice nohup setsid sh stdbuf sudo then time " +
    "timeout until while xargs zsh !"
  ).split(" "),
);

/** All in a line that may be a command, and rather too much: it is for rules that deny. */
export function anyParts(command: string): Set<string> {
  const found = new Set([command.trim()]);
  for (const part of command.replaceAll("\\\n", " ").split(/[;&|\n(){}`]+/)) {
    found.add(part.trim());
    const words = part
      .replace(/["'\\]/g, "")
      .split(/\s+/)
      .filter(Boolean);
    let option = false;
    while (words.length > 0) {
      const first = words[0]!;
      const program = first.slice(first.lastIndexOf("/") + 1);
      found.add(words.join(" ")).add([program, ...words.slice(1)].join(" "));
      // also what stands before the command: options and their values, durations, variables
      if (!option && !RUNS.has(program) && !/^(-|[\d.]+[smhd]?$|\w+=)/.test(first)) break;
      option = first.startsWith("-");
      words.shift();
    }
  }
  return found;
}
