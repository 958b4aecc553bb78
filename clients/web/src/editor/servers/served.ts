/** Which language server a file has, and how a server is seen. */

import type { ReadonlySignal } from "@preact/signals";
import type { Doc } from "../state/doc.js";

export type Kind = "typescript" | "css" | "html" | "json";

/** Begins the ids of their commands: they are no agent's work. */
export const LANGUAGE_SERVER = "language-server-";

export type ServerState = "installing" | "starting" | "running" | "resting" | "again" | "failed";

/** A language server as a person sees it. */
export interface ServerView {
  readonly kind: Kind;
  readonly title: string;
  readonly state: ReadonlySignal<ServerState>;
  /** Bytes; null until it is known. */
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
/** A longer text is a bundle, or data: a server would be busy with it for long. */
const LENGTH_MAX = 1_000_000;

/** Returns the server of a file, and its language's id in the protocol; null where it has none. */
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

/** Whether a file is one that a server may look at. */
export function served(doc: Doc, kind: Kind | null = null): boolean {
  if (doc.phase.value !== "ready" || (doc.state?.doc.length ?? 0) > LENGTH_MAX) return false;
  const found = servedBy(doc.path);
  return found !== null && (kind === null || found.kind === kind);
}
