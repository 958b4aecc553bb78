/** Applies a server's edits to the documents, for renaming and formatting. */

import type { EditorState, Text, TransactionSpec } from "@codemirror/state";
import type * as lsp from "vscode-languageserver-protocol";
import type { Doc } from "../state/doc.js";
import type { Documents } from "../state/documents.js";
import { change, type OpenFiles } from "./open-files.js";

/** The most files that one edit may change: each is opened. */
const FILES_MAX = 200;
const EDITS_MAX = 100_000;

/** Returns the offset of a position of the protocol, always within the text. */
export function offset(text: Text, { line, character }: lsp.Position): number {
  if (!(line >= 0) || line >= text.lines) return line >= text.lines ? text.length : 0;
  const found = text.line(Math.floor(line) + 1);
  return found.from + Math.min(Math.max(0, Math.floor(character) || 0), found.length);
}

export function position(text: Text, at: number): lsp.Position {
  const line = text.lineAt(at);
  return { line: line.number - 1, character: at - line.from };
}

/** Turns edits of the protocol into changes of a state. */
export function changing(
  state: EditorState,
  edits: readonly lsp.TextEdit[],
  userEvent: string,
): TransactionSpec {
  if (edits.length > EDITS_MAX) throw new Error(`There are more than ${EDITS_MAX} changes in one file.`);
  const changes = edits.map(({ range, newText }) => {
    const from = offset(state.doc, range.start);
    const to = Math.max(from, offset(state.doc, range.end));
    return { from, to, insert: state.toText(lines(newText, state)) };
  });
  return { changes, userEvent };
}

/** Gives a server's text the line breaks of a state; with others, several lines would become one. */
export function lines(text: string, state: EditorState): string {
  return text.replace(/\r?\n/g, state.lineBreak);
}

/** Returns a server's edits by file. */
export function byFile(edit: lsp.WorkspaceEdit): ReadonlyMap<string, readonly lsp.TextEdit[]> {
  const files = new Map<string, lsp.TextEdit[]>();
  const add = (uri: string, edits: readonly lsp.TextEdit[]) =>
    files.set(uri, [...(files.get(uri) ?? []), ...edits]);
  for (const [uri, edits] of Object.entries(edit.changes ?? {})) add(uri, edits);
  for (const one of edit.documentChanges ?? [])
    if ("edits" in one) add(one.textDocument.uri, one.edits as lsp.TextEdit[]);
  return files;
}

/**
 * Changes all files of an edit, including closed ones, and saves them with what else is unsaved in them. Returns the
 * number of changed files. Throws, and changes nothing, if the edit concerns anything but files of the workspace, or
 * one of them cannot be saved.
 */
export async function applyEdit(
  documents: Documents,
  files: OpenFiles,
  edit: lsp.WorkspaceEdit,
  known: (doc: Doc) => Text | null,
): Promise<number> {
  const found = [...byFile(edit)].filter(([, edits]) => edits.length > 0);
  const paths = found.map(([uri]) => files.path(uri));
  if (paths.some((path) => path === null || /(^|\/)node_modules\//.test(path)))
    throw new Error("It is used outside of the site's own files.");
  if (found.length > FILES_MAX) throw new Error(`It is used in more than ${FILES_MAX} files.`);
  const docs: Doc[] = [];
  for (const path of paths) docs.push(await documents.open(path!));
  const stale = docs.find((doc) => {
    const text = known(doc);
    return doc.state === null || doc.phase.value !== "ready" || (text !== null && text !== doc.state.doc);
  });
  if (stale !== undefined) throw new Error(`${stale.path} has changed meanwhile. Try again.`);
  await documents.saveTogether(
    new Map(docs.map((doc, at) => [doc, changing(doc.state!, found[at]![1], "rename")])),
  );
  return docs.length;
}

/** Formats a document with a server's edits. */
export function format(documents: Documents, doc: Doc, edits: readonly lsp.TextEdit[]): void {
  if (doc.state !== null && edits.length > 0) change(documents, doc, changing(doc.state, edits, "format"));
}
