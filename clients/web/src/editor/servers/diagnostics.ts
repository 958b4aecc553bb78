/** Marks the problems that a server finds in the text. */

import { type Diagnostic, setDiagnostics } from "@codemirror/lint";
import type { LSPClient } from "@codemirror/lsp-client";
import type * as lsp from "vscode-languageserver-protocol";
import type { Documents } from "../state/documents.js";
import { offset } from "./edits.js";
import { change, type OpenFile, type OpenFiles } from "./open-files.js";

/** Milliseconds after the last key before the server is asked. */
const REST = 250;
/** Milliseconds for the documents to read what somebody else wrote. */
const READ = 1500;
/** Problems marked in one file, at most. */
const MOST = 500;
const MESSAGE_MAX = 2000;

const SEVERITIES = ["error", "error", "warning", "info", "hint"] as const;

export class Diagnostics {
  readonly #documents: Documents;
  readonly #client: LSPClient;
  readonly #files: OpenFiles;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #later: ReturnType<typeof setTimeout> | undefined;

  constructor(documents: Documents, client: LSPClient, files: OpenFiles) {
    this.#documents = documents;
    this.#client = client;
    this.#files = files;
  }

  /** Checks the shown files once nobody types. */
  soon(): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#client.sync();
      for (const file of this.#files.files) if (file.view !== null) void this.#look(file);
    }, REST);
  }

  /** Checks again once open files that somebody else changed have been read. */
  later(): void {
    clearTimeout(this.#later);
    this.#later = setTimeout(() => this.soon(), READ);
  }

  async #look(file: OpenFile): Promise<void> {
    if (this.#client.serverCapabilities?.diagnosticProvider == null) return;
    const { doc } = file;
    try {
      const report = await this.#client.request<object, lsp.DocumentDiagnosticReport | null>(
        "textDocument/diagnostic",
        { textDocument: { uri: file.uri } },
      );
      // a text that has changed since is checked again
      if (report?.kind === "full" && file.doc === doc) this.#mark(file, report.items);
    } catch {
      // the server has ended or is too slow; the next change asks again
    }
  }

  /** Handles diagnostics that a server sends by itself. */
  published({ uri, version, diagnostics }: lsp.PublishDiagnosticsParams): void {
    const file = this.#files.getFile(uri);
    if (file !== null && (version === undefined || version === file.version)) this.#mark(file, diagnostics);
  }

  #mark(file: OpenFile, found: readonly lsp.Diagnostic[]): void {
    const { state } = file.of;
    if (state === null || state.doc !== file.doc) return;
    const marks = found.slice(0, MOST).map(({ range, severity, message, source }): Diagnostic => {
      const from = offset(state.doc, range.start);
      return {
        from,
        to: Math.max(from, offset(state.doc, range.end)),
        severity: SEVERITIES[severity ?? 1] ?? "error",
        message: (typeof message === "string" ? message : message.value).slice(0, MESSAGE_MAX),
        ...(source === undefined ? {} : { source: source.slice(0, 40) }),
      };
    });
    change(this.#documents, file.of, setDiagnostics(state, marks));
  }

  dispose(): void {
    clearTimeout(this.#timer);
    clearTimeout(this.#later);
  }
}
