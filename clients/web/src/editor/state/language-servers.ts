/** Which open files need a language server. The code for servers is loaded when the first one does. */

import type { FileChanges, Tenant } from "@incus-gateway/client";
import { computed, effect, signal } from "@preact/signals";
import { type Kind, type ServerView, served, servedBy } from "../servers/served.js";
import type { Servers } from "../servers/servers.js";
import type { Doc } from "./doc.js";
import type { Documents } from "./documents.js";
import { idle } from "./idle.js";
import { load } from "./network.js";
import { languageServers } from "./settings.js";
import { complain } from "./toasts.js";

/** The caller that wanted them reports that they did not load. */
const untold = () => {};

export class LanguageServers {
  readonly list = signal<readonly ServerView[]>([]);
  readonly #documents: Documents;
  readonly #stop: () => void;
  #servers: Promise<Servers> | null = null;

  /** `workspace` is the folder of the tenant's files; null until commands can run there. */
  constructor(tenant: () => Tenant, documents: Documents, workspace: () => string | null) {
    this.#documents = documents;
    const where = computed(workspace);
    this.#stop = effect(() => {
      const place = where.value;
      const shown = [documents.tabs.active.value, documents.tabs.beside.value].filter((doc) => doc !== null);
      const wanted = shown.filter((doc) => served(doc)).map((doc) => servedBy(doc.path)!.kind);
      if (!languageServers.value || place === null) this.#end();
      else if (wanted.length > 0) void this.#want(tenant, place, wanted);
    });
  }

  async #want(tenant: () => Tenant, workspace: string, kinds: readonly Kind[]): Promise<void> {
    this.#servers ??= idle()
      .then(() => load(() => import("../servers/servers.js")))
      .then(({ Servers }) => new Servers(tenant, this.#documents, workspace, this.list));
    try {
      (await this.#servers).want(kinds);
    } catch (error) {
      this.#servers = null;
      complain(error, "Loading language servers");
    }
  }

  /** Handles changes seen by the watcher. */
  changed(changes: FileChanges): void {
    void this.#servers?.then((servers) => servers.changed(changes), untold);
  }

  /** Formats a document if its server is running and supports it. */
  async format(doc: Doc): Promise<void> {
    await (await this.#servers)?.format(doc);
  }

  #end(): void {
    void this.#servers?.then((servers) => servers.dispose(), untold);
    this.#servers = null;
  }

  dispose(): void {
    this.#stop();
    this.#end();
  }
}
