/** The language servers of the open tenant. */

import type { FileChanges, Tenant } from "@incus-gateway/client";
import type { Signal } from "@preact/signals";
import { replacing } from "../code/editor.js";
import type { Doc } from "../state/doc.js";
import type { Documents } from "../state/documents.js";
import { complain } from "../state/toasts.js";
import { change } from "./open-files.js";
import { prettier } from "./prettier.js";
import { type Kind, type ServerView, served, servedBy } from "./served.js";
import { Server } from "./server.js";

export class Servers {
  readonly #tenant: () => Tenant;
  readonly #documents: Documents;
  readonly #workspace: string;
  readonly #list: Signal<readonly ServerView[]>;
  readonly #of = new Map<Kind, Server>();

  constructor(
    tenant: () => Tenant,
    documents: Documents,
    workspace: string,
    list: Signal<readonly ServerView[]>,
  ) {
    this.#tenant = tenant;
    this.#documents = documents;
    this.#workspace = workspace;
    this.#list = list;
  }

  want(kinds: readonly Kind[]): void {
    for (const kind of kinds) {
      let server = this.#of.get(kind);
      if (server === undefined) {
        server = new Server(kind, this.#tenant, this.#documents, this.#workspace);
        this.#of.set(kind, server);
        this.#list.value = [...this.#of.values()];
      }
      server.want();
    }
  }

  changed(changes: FileChanges): void {
    for (const server of this.#of.values()) server.changed(changes);
  }

  async format(doc: Doc): Promise<void> {
    const known = served(doc) ? servedBy(doc.path) : null;
    if (known === null || doc.state === null) return;
    const before = doc.state.doc;
    try {
      const text = await prettier(this.#tenant(), doc);
      if (text === null) await this.#of.get(known.kind)?.format(doc);
      else if (doc.state?.doc === before && text !== "")
        change(this.#documents, doc, replacing(doc.state, text, false));
    } catch (error) {
      complain(error, "Formatting");
    }
  }

  dispose(): void {
    for (const server of this.#of.values()) server.dispose();
    this.#list.value = [];
  }
}
