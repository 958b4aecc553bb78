/** Searches text by Grep and files by Glob. */

import type { Entry, Tenant, ToolResult } from "@incus-gateway/client";
import { unique } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { basename } from "./paths.js";

export interface Match {
  readonly path: string;
  readonly line: number;
  readonly text: string;
}

export interface Found {
  readonly files: readonly { readonly path: string; readonly matches: readonly Match[] }[];
  readonly total: number;
  readonly truncated: boolean;
}

/** Folders that a search leaves out unless it names them: nobody wants their text. */
const HEAVY = new Set(["node_modules", ".git", ".gateway", "dist", "build", ".vite", ".cache", ".next"]);
const LIMIT = 600;

/** Marks the editor's own calls, which are no agent's work and not shown as such. */
export const OWN = "editor-";

function silent(): string {
  return OWN + unique();
}

export class Search {
  readonly #tenant: () => Tenant;
  readonly query = signal("");
  readonly include = signal("");
  readonly matchCase = signal(false);
  readonly regex = signal(false);
  readonly found = signal<Found | null>(null);
  readonly failure = signal<string | null>(null);
  readonly busy = signal(false);
  #ending = new AbortController();

  constructor(tenant: () => Tenant) {
    this.#tenant = tenant;
  }

  /** Searches for what is in the signals; a search that is under way is given up. */
  async run(): Promise<void> {
    this.#ending.abort();
    const ending = new AbortController();
    this.#ending = ending;
    const query = this.query.value;
    this.failure.value = null;
    if (query === "") {
      this.found.value = null;
      this.busy.value = false;
      return;
    }
    this.busy.value = true;
    const pattern = this.regex.value ? query : query.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
    const include = this.include.value.trim();
    const without = [...HEAVY].filter((name) => !include.includes(name)).map((name) => `!**/${name}/**`);
    try {
      const result = await this.#tenant().tool(
        "Grep",
        {
          pattern,
          output_mode: "content",
          "-n": true,
          "-i": !this.matchCase.value,
          head_limit: LIMIT,
          glob: [include, ...without].join(" ").trim(),
        },
        { signal: ending.signal, callId: silent() },
      );
      if (result.isError) this.failure.value = text(result);
      else this.found.value = parse(result);
    } catch (error) {
      if (!ending.signal.aborted) this.failure.value = error instanceof Error ? error.message : String(error);
    } finally {
      if (this.#ending === ending) this.busy.value = false;
    }
  }

  /** Returns the files whose path holds the characters of `query` in this order, the best first; `top` is known. */
  async files(query: string, top: readonly Entry[], signal: AbortSignal): Promise<readonly string[]> {
    const tenant = this.#tenant();
    const glob = async (pattern: string, path: string): Promise<readonly string[]> => {
      const result = await tenant.tool("Glob", { pattern, path }, { signal, callId: silent() });
      return result.isError ? [] : ((result.structuredContent.files as string[] | undefined) ?? []);
    };
    const last = query.slice(query.lastIndexOf("/") + 1);
    const pattern = `*${[...last].map(either).join("*")}${last === "" ? "" : "*"}`;
    const light = top.filter(({ type, path }) => type === "directory" && !HEAVY.has(path));
    // folder by folder: the tool answers with at most a hundred, and node_modules would fill them all
    const below = await Promise.all(light.map(({ path }) => glob(`**/${pattern}`, path)));
    const beside = top.filter(({ type }) => type !== "directory").map(({ path }) => path);
    const paths = [...beside, ...below.flat().map((path) => path.replace(/^\.\//, ""))];
    const scored = [...new Set(paths)]
      .filter((path) => !path.split("/").some((part) => HEAVY.has(part)))
      .map((path) => ({ path, score: score(path, query) }))
      .filter(({ score }) => score > 0);
    return scored
      .sort((a, b) => b.score - a.score || a.path.length - b.path.length)
      .slice(0, 60)
      .map(({ path }) => path);
  }
}

function text(result: ToolResult): string {
  return result.content.map((part) => (part.type === "text" ? part.text : "")).join("\n");
}

/** A character of a file's name as a glob in which case does not matter. */
function either(char: string): string {
  const [lower, upper] = [char.toLowerCase(), char.toUpperCase()];
  if (lower !== upper) return `[${lower}${upper}]`;
  return /[[\]{}*?!\\]/.test(char) ? "?" : char;
}

function parse(result: ToolResult): Found {
  const files = new Map<string, Match[]>();
  let total = 0;
  for (const line of text(result).split("\n")) {
    const found = /^(.+?):(\d+):(.*)$/.exec(line);
    if (found === null) continue;
    const [, path = "", number = "", rest = ""] = found;
    const matches = files.get(path) ?? [];
    matches.push({ path, line: Number(number), text: rest });
    files.set(path, matches);
    total += 1;
  }
  const truncated = Boolean(result.structuredContent.truncated);
  return { files: [...files].map(([path, matches]) => ({ path, matches })), total, truncated };
}

/** Says how well a path answers a query: 0 where it does not hold its characters in their order. */
export function score(path: string, query: string): number {
  if (query === "") return 1;
  const [where, what] = [path.toLowerCase(), query.toLowerCase()];
  const name = basename(where);
  if (name === what) return 1000;
  if (name.startsWith(what)) return 800;
  if (name.includes(what)) return 600;
  if (where.includes(what)) return 500;
  let points = 0;
  let at = -1;
  for (const char of what) {
    const next = where.indexOf(char, at + 1);
    if (next < 0) return 0;
    const before = where[next - 1] ?? "/";
    points += next === at + 1 ? 5 : /[/._-]/.test(before) ? 4 : 1;
    at = next;
  }
  return points;
}
