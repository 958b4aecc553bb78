/** Which language server a file has, and what the editor shows of a server. */

import type { ReadonlySignal } from "@preact/signals";
import type { Doc } from "../state/doc.js";

export type Kind = "typescript" | "css" | "html" | "json";

/** Prefix of their commands' ids, by which they are not taken for an agent's work. */
export const LANGUAGE_SERVER = "language-server-";

export type ServerState = "installing" | "starting" | "running" | "resting" | "again" | "failed";

/** A language server as shown to a person. */
export interface ServerView {
  readonly kind: Kind;
  readonly title: string;
  readonly state: ReadonlySignal<ServerState>;
  /** Bytes; null while unknown. */
  readonly memory: ReadonlySignal<number | null>;
  /** Why it failed. */
  readonly failure: ReadonlySignal<string>;
  restart(): void;
}

const SCRIPTS: Readonly<Record<string, string>> = {
  ts: "typescript",
  mts: "typescript",
  cts: "typescript",
  tsx: "typescriptreact",
  js: "javascript",
  mjs: "javascript",
  cjs: "javascript",
  jsx: "javascriptreact",
};
const SHEETS = /^(css|scss|less)$/;
/** Longest text that is served. A longer one is a bundle or data, and would keep a server busy for long. */
const LENGTH_MAX = 1_000_000;

/** Returns a file's server and its language's id in the protocol, or null. */
export function servedBy(path: string): { readonly kind: Kind; readonly language: string } | null {
  const extension = path.slice(path.lastIndexOf(".") + 1).toLowerCase();
  const script = SCRIPTS[extension];
  if (script !== undefined) return { kind: "typescript", language: script };
  if (SHEETS.test(extension)) return { kind: "css", language: extension };
  if (extension === "html" || extension === "htm") return { kind: "html", language: "html" };
  if (extension === "json" || extension === "jsonc") {
    const comments = extension === "jsonc" || /(^|\/)[tj]sconfig[^/]*\.json$/.test(path);
    return { kind: "json", language: comments ? "jsonc" : "json" };
  }
  return null;
}

/** Whether a server may read a file. */
export function served(doc: Doc, kind: Kind | null = null): boolean {
  if (doc.phase.value !== "ready" || (doc.state?.doc.length ?? 0) > LENGTH_MAX) return false;
  const found = servedBy(doc.path);
  return found !== null && (kind === null || found.kind === kind);
}
