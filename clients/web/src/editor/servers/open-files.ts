/** The open documents, shown or not, as a language server sees them. */

import { type LSPClient, LSPPlugin, Workspace, type WorkspaceFile } from "@codemirror/lsp-client";
import { ChangeSet, type Extension, type Text, type TransactionSpec } from "@codemirror/state";
import type { EditorView } from "@codemirror/view";
import type { Doc } from "../state/doc.js";
import type { Documents } from "../state/documents.js";
import { relative } from "../state/paths.js";

/** Changes a document, in its view if it is shown. */
export function change(documents: Documents, doc: Doc, spec: TransactionSpec): void {
  const stage = [...documents.stages].find((one) => one.doc === doc);
  if (stage !== undefined) stage.dispatch(spec);
  else if (doc.state !== null) documents.updated(doc, doc.state.update(spec).state);
}

export class OpenFile implements WorkspaceFile {
  version = 0;
  /** The view that shows the file, if any. */
  view: EditorView | null = null;
  /** The text that the server has. */
  doc: Text;
  /** The server's extension of the file's state. */
  extension: Extension = [];

  constructor(
    readonly uri: string,
    readonly languageId: string,
    readonly of: Doc,
  ) {
    this.doc = of.state!.doc;
  }

  getView(): EditorView | null {
    return this.view;
  }

  /** The current text, which the server may not have yet. */
  get present(): Text {
    return this.of.state?.doc ?? this.doc;
  }
}

export class OpenFiles extends Workspace {
  files: OpenFile[] = [];
  readonly #folder: string;

  constructor(client: LSPClient, folder: string) {
    super(client);
    this.#folder = folder;
  }

  override getFile(uri: string): OpenFile | null {
    return this.files.find((file) => file.uri === uri) ?? null;
  }

  of(doc: Doc): OpenFile | null {
    return this.files.find((file) => file.of === doc) ?? null;
  }

  uri(path: string): string {
    return `file://${`${this.#folder}/${path}`.split("/").map(encodeURIComponent).join("/")}`;
  }

  /** Returns the path of a file in the workspace, null for any other URI. */
  path(uri: string): string | null {
    try {
      const url = new URL(uri);
      return url.protocol === "file:" ? relative(decodeURIComponent(url.pathname), this.#folder) : null;
    } catch {
      return null;
    }
  }

  add(doc: Doc, languageId: string): OpenFile {
    const file = new OpenFile(this.uri(doc.path), languageId, doc);
    this.files.push(file);
    this.client.didOpen(file);
    return file;
  }

  remove(file: OpenFile): void {
    this.files = this.files.filter((other) => other !== file);
    this.client.didClose(file.uri);
  }

  override syncFiles() {
    const updates = [];
    for (const file of this.files) {
      const { present, doc: prevDoc } = file;
      if (present === prevDoc) continue;
      const plugin = file.view === null ? null : LSPPlugin.get(file.view);
      const changes =
        plugin?.syncedDoc === prevDoc && plugin.unsyncedChanges.newLength === present.length
          ? plugin.unsyncedChanges
          : ChangeSet.of({ from: 0, to: prevDoc.length, insert: present }, prevDoc.length);
      file.doc = present;
      file.version += 1;
      plugin?.clear();
      updates.push({ file, prevDoc, changes });
    }
    return updates;
  }

  openFile(uri: string, _language: string, view: EditorView): void {
    const file = this.getFile(uri);
    if (file !== null) file.view = view;
  }

  closeFile(uri: string, view: EditorView): void {
    const file = this.getFile(uri);
    if (file?.view === view) file.view = null;
  }

  override connected(): void {} // files are added once the server has answered
}
