/** Searches text by Grep, and replaces it. */

import type { Tenant, ToolResult } from "@incus-gateway/client";
import { unique } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { HEAVY } from "./file-index.js";
import { type Replaced, replaceIn } from "./replace.js";

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
  /** What takes the place of what is found, and whether that is asked for. */
  readonly replacement = signal("");
  readonly replacing = signal(false);
  readonly matchCase = signal(false);
  readonly regex = signal(false);
  readonly found = signal<Found | null>(null);
  readonly failure = signal<string | null>(null);
  readonly busy = signal(false);
  #ending = new AbortController();

  constructor(tenant: () => Tenant) {
    this.#tenant = tenant;
  }

  /** Replaces every place in the files that are listed, and searches again. */
  async replace(): Promise<Replaced> {
    const wanted = { query: this.query.value, regex: this.regex.value, matchCase: this.matchCase.value };
    this.busy.value = true;
    try {
      const paths = this.found.value?.files.map(({ path }) => path) ?? [];
      return await replaceIn(this.#tenant(), paths, wanted, this.replacement.value);
    } finally {
      void this.run();
    }
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
}

function text(result: ToolResult): string {
  return result.content.map((part) => (part.type === "text" ? part.text : "")).join("\n");
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
