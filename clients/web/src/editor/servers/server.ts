/** One language server of the open tenant. It starts when needed and ends when unused. */

import { indentUnit } from "@codemirror/language";
import { LSPClient } from "@codemirror/lsp-client";
import type { Extension } from "@codemirror/state";
import { EditorView } from "@codemirror/view";
import type { FileChanges, Tenant } from "@incus-gateway/client";
import { effect, signal, untracked } from "@preact/signals";
import type * as lsp from "vscode-languageserver-protocol";
import { serve, serving } from "../code/editor.js";
import type { Doc } from "../state/doc.js";
import type { Documents } from "../state/documents.js";
import { Diagnostics } from "./diagnostics.js";
import { plain } from "./documentation.js";
import { format } from "./edits.js";
import { byHand, features } from "./features.js";
import { INITIALIZATION, SETTINGS } from "./kinds.js";
import { change, OpenFiles } from "./open-files.js";
import { installed, Missing, ServerProcess } from "./process.js";
import { type Kind, type ServerState, type ServerView, served, servedBy } from "./served.js";

/** Milliseconds without use before it is ended. */
const REST = 5 * 60_000;
/** Milliseconds for an answer; for the first one the server reads the whole site. */
const ANSWER = 60_000;
const FORMAT = 5000;
/** Characters of a server's request, at most. */
const ASKED_MAX = 65_536;
/** Restarts within so many milliseconds; after that a person has to start it. */
const AGAIN = 3;
const AGAIN_WITHIN = 3 * 60_000;
const AGAIN_AFTER = [500, 2000, 5000];

/** Files that package managers write at their end. */
const PACKAGES_CHANGED = /(^|\/)(package(-lock)?\.json|bun\.lockb?|pnpm-lock\.yaml|yarn\.lock)$/;
/** Milliseconds without changes after that before the server is restarted. */
const ANEW = 3000;

/** The editor's capabilities beyond those of lsp-client. */
const CAPABILITIES = {
  workspace: {
    configuration: true,
    didChangeWatchedFiles: { dynamicRegistration: true },
    workspaceEdit: { documentChanges: true },
    diagnostics: { refreshSupport: true },
  },
  textDocument: {
    completion: { completionItem: { resolveSupport: { properties: ["documentation", "detail"] } } },
    publishDiagnostics: { versionSupport: true },
  },
};

const TITLES: Readonly<Record<Kind, string>> = {
  typescript: "TypeScript",
  css: "CSS",
  html: "HTML",
  json: "JSON",
};

/** A running server, until its process ends. */
interface Session {
  readonly client: LSPClient;
  readonly process: ServerProcess;
  readonly files: OpenFiles;
  readonly diagnostics: Diagnostics;
  readonly extension: Extension;
  stop(): void;
}

export class Server implements ServerView {
  readonly title: string;
  readonly state = signal<ServerState>("resting");
  readonly memory = signal<number | null>(null);
  readonly failure = signal("");
  #session: Session | null = null;
  /** The number of the latest start; results of earlier ones are ignored. */
  #turn = 0;
  #ends: number[] = [];
  #timer: ReturnType<typeof setTimeout> | undefined;
  #anew: ReturnType<typeof setTimeout> | undefined;
  #usedAt = 0;

  constructor(
    readonly kind: Kind,
    readonly tenant: () => Tenant,
    readonly documents: Documents,
    readonly workspace: string,
  ) {
    this.title = TITLES[kind];
  }

  /** Starts it if it rests, and keeps it running. */
  want(): void {
    this.#used();
    if (this.state.peek() === "resting") void this.#start();
  }

  /** Restarts it at a person's request. */
  restart(): void {
    this.#ends = [];
    this.#end("resting");
    this.want();
  }

  #used(): void {
    this.#usedAt = Date.now();
  }

  async #start(install = true): Promise<void> {
    const turn = ++this.#turn;
    const here = () => turn === this.#turn;
    this.state.value = "starting";
    this.failure.value = "";
    try {
      const session = await this.#begin(here, install);
      if (!here()) return session.stop();
      this.#session = session;
      this.state.value = "running";
      this.#timer = setTimeout(() => this.#rest(), REST);
    } catch (error) {
      if (!here()) return;
      if (error instanceof Missing && install) await this.#install(here);
      else this.#broken(error instanceof Error ? error : new Error(String(error)));
    }
  }

  async #install(here: () => boolean): Promise<void> {
    this.state.value = "installing";
    try {
      await installed(this.tenant(), this.kind);
      if (here()) await this.#start(false);
    } catch (error) {
      if (here()) this.#fail(`It could not be installed. ${(error as Error).message}`);
    }
  }

  async #begin(here: () => boolean, install: boolean): Promise<Session> {
    const handlers = new Set<(text: string) => void>();
    let end: (error: Error) => void = () => {};
    const ended = new Promise<never>((_resolve, reject) => {
      end = reject;
    });
    ended.catch(() => {});
    let begun = false;
    const process = await ServerProcess.start(this.tenant(), this.kind, {
      message: (text) => {
        if (this.#answer(text, process, session)) return;
        for (const handle of handlers) handle(text);
      },
      memory: (bytes) => {
        if (here()) this.memory.value = bytes;
      },
      ended: (error) => {
        end(error);
        if (begun && here()) this.#broken(error);
      },
    });
    const client = new LSPClient({
      rootUri: `file://${this.workspace}`,
      initializationOptions: INITIALIZATION[this.kind],
      timeout: ANSWER,
      workspace: (client) => new OpenFiles(client, this.workspace),
      sanitizeHTML: plain,
      extensions: [{ clientCapabilities: CAPABILITIES }],
      notificationHandlers: {
        "window/logMessage": () => true,
        "window/showMessage": () => true,
        "textDocument/publishDiagnostics": (_client, params) => {
          session.diagnostics.published(params);
          return true;
        },
      },
    });
    const files = client.workspace as OpenFiles;
    const diagnostics = new Diagnostics(this.documents, client, files);
    const around = {
      ...{ documents: this.documents, client, files },
      used: () => this.#used(),
      changed: () => diagnostics.soon(),
    };
    let following = () => {};
    const session: Session = {
      ...{ client, process, files, diagnostics },
      extension: features(around),
      stop: () => {
        following();
        diagnostics.dispose();
        // another start may have served it meanwhile
        for (const { of, extension } of files.files)
          if (of.state !== null && serving(of.state) === extension)
            change(this.documents, of, serve(this.#waking()));
        files.files = [];
        client.disconnect();
        process.stop();
      },
    };
    client.connect({
      send: (message) => process.send(message),
      subscribe: (handler) => handlers.add(handler),
      unsubscribe: (handler) => handlers.delete(handler),
    });
    try {
      await Promise.race([client.initializing, ended]);
    } catch (error) {
      client.disconnect();
      process.stop();
      throw error instanceof Missing && !install ? new Error("It is not where it was installed.") : error;
    }
    begun = true;
    following = effect(() => {
      const docs = this.documents.tabs.open.value.filter((doc) => served(doc, this.kind));
      void [this.documents.tabs.active.value, this.documents.tabs.beside.value];
      untracked(() => this.#reconcile(session, docs));
    });
    return session;
  }

  /** Connects the server and the open documents. */
  #reconcile({ client, files, extension, diagnostics }: Session, docs: readonly Doc[]): void {
    for (const file of files.files) {
      if (docs.includes(file.of) && file.uri === files.uri(file.of.path)) continue;
      files.remove(file);
      if (this.documents.tabs.open.value.includes(file.of)) change(this.documents, file.of, serve([]));
    }
    for (const doc of docs) {
      const known = files.of(doc);
      const file = known ?? files.add(doc, servedBy(doc.path)!.language);
      if (known === null) file.extension = [client.plugin(file.uri, file.languageId), extension];
      // a file that was read again has a new state
      if (doc.state !== null && serving(doc.state) !== file.extension)
        change(this.documents, doc, serve(file.extension));
    }
    diagnostics.soon();
  }

  /** Makes the next key in one of its files start it again. */
  #waking(): Extension {
    return EditorView.updateListener.of((update) => {
      if (byHand(update)) this.want();
    });
  }

  /** Answers a server's request to the editor; returns whether the message needs nothing more. */
  #answer(text: string, process: ServerProcess, session: Session): boolean {
    if (text.length > ASKED_MAX) return false; // a long message is an answer
    const { id, method, params } = JSON.parse(text) as { id?: unknown; method?: string; params?: unknown };
    if (id === undefined || method === undefined) return false;
    const reply = (result: unknown) => process.send(JSON.stringify({ jsonrpc: "2.0", id, result }));
    if (method === "workspace/configuration") {
      const { items } = params as lsp.ConfigurationParams;
      reply(items.map(({ section }) => SETTINGS[section ?? ""] ?? null));
    } else if (
      /^(client\/(un)?registerCapability|workspace\/\w+\/refresh|window\/workDoneProgress\/create)$/.test(
        method,
      )
    ) {
      reply(null);
      if (method === "workspace/diagnostic/refresh") session.diagnostics.soon();
    } else return false;
    return true;
  }

  /** Tells the server about files changed by anybody. */
  changed({ changes, overflow }: FileChanges): void {
    const session = this.#session;
    if (session === null) return;
    const types = { created: 1, changed: 2, removed: 3 } as const;
    const told = changes.map(({ path, change }) => ({ uri: session.files.uri(path), type: types[change] }));
    session.client.notification("workspace/didChangeWatchedFiles", { changes: told });
    session.diagnostics.soon();
    session.diagnostics.later();
    // installed packages are not watched, and anything may have been missed: only a restart reads everything
    if (!overflow && !changes.some(({ path }) => PACKAGES_CHANGED.test(path))) return;
    clearTimeout(this.#anew);
    this.#anew = setTimeout(() => this.#session !== null && this.restart(), ANEW);
  }

  async format(doc: Doc): Promise<void> {
    const session = this.#session;
    const file = session?.files.of(doc);
    if (!session || !file || doc.state === null) return;
    if (!session.client.serverCapabilities?.documentFormattingProvider) return;
    this.#used();
    session.client.sync();
    const text = doc.state.doc;
    const indent = doc.state.facet(indentUnit);
    const options = { tabSize: doc.state.tabSize, insertSpaces: !indent.startsWith("\t") };
    const params = {
      textDocument: { uri: file.uri },
      options: { ...options, ...(options.insertSpaces ? { tabSize: indent.length } : {}) },
    };
    const late = new Promise<null>((resolve) => setTimeout(resolve, FORMAT, null));
    const request = session.client.request<object, lsp.TextEdit[] | null>("textDocument/formatting", params);
    const edits = await Promise.race([request.catch(() => null), late]);
    if (edits !== null && doc.state?.doc === text) format(this.documents, doc, edits);
  }

  #rest(): void {
    const left = this.#usedAt + REST - Date.now();
    if (left > 0) this.#timer = setTimeout(() => this.#rest(), left);
    else this.#end("resting");
  }

  /** Handles a server that has ended by itself. */
  #broken(error: Error): void {
    const now = Date.now();
    this.#ends = [...this.#ends.filter((end) => now - end < AGAIN_WITHIN), now];
    if (this.#ends.length > AGAIN) {
      this.#fail(error.message);
      return;
    }
    this.#end("again");
    const turn = this.#turn;
    const after = AGAIN_AFTER[this.#ends.length - 1];
    this.#timer = setTimeout(() => turn === this.#turn && void this.#start(), after);
  }

  #fail(message: string): void {
    this.#end("failed");
    this.failure.value = message;
  }

  #end(state: ServerState): void {
    this.#turn += 1;
    clearTimeout(this.#timer);
    clearTimeout(this.#anew);
    const session = this.#session;
    this.#session = null;
    this.memory.value = null;
    this.state.value = state;
    session?.stop();
  }

  dispose(): void {
    const files = this.#session?.files.files.map(({ of }) => of) ?? [];
    this.#end("failed"); // so that nothing starts it again
    for (const doc of files) change(this.documents, doc, serve([]));
  }
}
