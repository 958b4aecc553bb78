/** The open tenant: its connection and everything shown of it. */

import {
  GatewayError,
  type LinkStatus,
  type ServerInfo,
  type Tenant,
  type TenantInfo,
} from "@incus-gateway/client";
import { effect, signal, untracked } from "@preact/signals";
import { Activity } from "./activity.js";
import { Agent } from "./agent.js";
import { Deploys } from "./deploys.js";
import type { Doc } from "./doc.js";
import { Documents } from "./documents.js";
import { Drafts } from "./drafts.js";
import { FileIndex } from "./file-index.js";
import { History } from "./history.js";
import { once } from "./idle.js";
import { Insights } from "./insights.js";
import { type Kept, kept } from "./kept.js";
import { LanguageServers } from "./language-servers.js";
import { basename, relative } from "./paths.js";
import { Search } from "./search.js";
import { allows, gateway, identify, look, session, signIn, who, writeAddress } from "./session.js";
import { autosave, formatOnSave } from "./settings.js";
import { Site } from "./site.js";
import { covers } from "./slots.js";
import { Terminals } from "./terminals.js";
import { complain, say } from "./toasts.js";
import { Tree } from "./tree.js";

/** How many earlier events are requested; ids count up by one. */
const EARLIER = 1500;
/** Milliseconds without a move of the cursor until it is remembered. */
const REST = 400;
/** Milliseconds without a key until a text is saved automatically. */
const PAUSE = 1000;

export class Workspace {
  #tenant: Tenant;
  readonly status = signal<LinkStatus>({
    state: "idle",
    attempt: 0,
    retryAt: null,
    error: null,
    expires: null,
    latency: null,
  });
  readonly server = signal<ServerInfo | null>(null);
  readonly info = signal<TenantInfo | null>(null);
  readonly starting = signal(false);
  readonly tree: Tree;
  readonly files: FileIndex;
  readonly documents: Documents;
  readonly terminals: Terminals;
  readonly activity: Activity;
  readonly deploys = new Deploys();
  readonly site: Site;
  readonly history: History;
  readonly insights: Insights;
  readonly search: Search;
  readonly agent: Agent;
  readonly servers: LanguageServers;
  readonly #stops: (() => void)[] = [];
  #wentOn = 0;
  readonly #key: string;
  /** What the previous page had open; later writes are this page's. */
  readonly #left: Kept;
  readonly #drafts: Drafts;
  /** Whether the previous page's files are open again. */
  readonly #restored = signal(false);

  constructor(readonly name: string) {
    this.#key = `gateway.open.${name}`;
    this.#left = kept(this.#key);
    this.#drafts = new Drafts(name, () => who());
    const tenant = () => this.#tenant;
    this.#tenant = gateway.tenant(name, { insist: true });
    this.tree = new Tree(tenant, this.#left.folders);
    this.files = new FileIndex(tenant);
    this.documents = new Documents(tenant, () => !allows("files:write"), this.#drafts);
    this.terminals = new Terminals(tenant, name);
    this.activity = new Activity(() => this.server.value?.workspace ?? "/srv/site");
    this.site = new Site(tenant, this.deploys);
    this.history = new History(tenant);
    this.insights = new Insights(tenant);
    this.search = new Search(tenant);
    this.agent = new Agent(tenant, name);
    this.servers = new LanguageServers(tenant, this.documents, () => this.#ready);
    const { follow } = this.activity;
    this.activity.onWritten = (path) => void this.documents.follow(path, () => follow.value);
    this.#stops.push(
      effect(() => {
        const active = this.documents.tabs.active.value?.path ?? null;
        void [this.documents.tabs.open.value, this.tree.rows.value];
        if (!this.#restored.peek()) return;
        this.keep();
        writeAddress(name, active);
      }),
      effect(() => {
        if (session.value) untracked(() => this.#goOn());
      }),
    );
    void this.#begin();
  }

  /** Stores the open files and cursors, for the next page after a reload. */
  keep(): void {
    const { open, active } = this.documents.tabs;
    const value: Kept = {
      open: open.peek().map((doc) => doc.left),
      active: active.peek()?.path ?? null,
      folders: this.tree.open,
    };
    try {
      sessionStorage.setItem(this.#key, JSON.stringify(value));
    } catch {
      // storage is full or forbidden: the window still works
    }
  }

  get tenant(): Tenant {
    return this.#tenant;
  }

  /** Whether files can be changed now; shows a message if not. Only saves wait until they can. */
  get reachable(): boolean {
    const open = this.status.value.state === "open";
    if (!open) say("The gateway cannot be reached now. Nothing was changed.", "error");
    return open;
  }

  /** The workspace's folder, once commands can run there. */
  get #ready(): string | null {
    const runs = this.info.value?.status === "running" && allows("exec");
    return runs ? (this.server.value?.workspace ?? null) : null;
  }

  /** Saves a document by hand, formatted first if that is switched on. */
  async save(doc: Doc): Promise<void> {
    if (formatOnSave.value && allows("files:write") && doc.theirs.value === null)
      await this.servers.format(doc);
    await this.documents.save(doc);
  }

  /** Resolves once the page's first file has loaded, if there is one. */
  begun(): Promise<void> {
    const { active } = this.documents.tabs;
    return once(() => this.#restored.value && active.value?.phase.value !== "loading");
  }

  /** Reopens the files of the page that was left, or that crashed. */
  async restore(file: string | null): Promise<void> {
    const { open, active } = this.#left;
    const drafts = await this.#drafts.take().catch(() => []);
    const wanted = file ?? active;
    const opening = this.documents.restore(open, wanted, drafts);
    this.#restored.value = true;
    this.keep();
    const shown = this.documents.tabs.active.value?.path ?? null;
    writeAddress(this.name, shown);
    if (shown !== null) void this.tree.reveal(shown);
    await opening;
    if (drafts.length > 0) {
      const names = drafts.map(({ path }) => basename(path));
      say(`Unsaved text was restored: ${names.slice(0, 3).join(", ")}${names.length > 3 ? "…" : ""}.`);
    }
  }

  #keeping: ReturnType<typeof setTimeout> | undefined;

  /** Remembers where the cursor is once it rests. */
  keepSoon(): void {
    clearTimeout(this.#keeping);
    this.#keeping = setTimeout(() => this.keep(), REST);
  }

  #saving: ReturnType<typeof setTimeout> | undefined;

  /** Saves automatically after a pause in typing, if that is switched on; conflicts wait for the user. */
  saveSoon(): void {
    if (!autosave.value) return;
    clearTimeout(this.#saving);
    this.#saving = setTimeout(() => {
      for (const doc of this.documents.tabs.open.value)
        if (doc.dirty.value && !doc.gone.value && doc.theirs.value === null)
          void this.documents.save(doc, false);
    }, PAUSE);
  }

  /** Stores what would be lost with the page; returns whether nothing else is unsaved. */
  leave(): boolean {
    this.keep();
    void this.#drafts.flush();
    return !this.documents.dirty || !this.#drafts.atRisk;
  }

  async #begin(): Promise<void> {
    const tenant = this.#tenant;
    this.#stops.push(
      tenant.onStatus((status) => {
        if (tenant !== this.#tenant) return;
        const before = this.status.value.state;
        this.status.value = status;
        if (status.error?.code === "unauthorized" && status.state !== before) void look();
        if (status.state === "open" && before !== "open") {
          this.documents.flush();
          // usage and address may have changed during a break
          void this.refreshInfo();
        }
      }),
    );
    try {
      this.server.value = await tenant.connect();
      await Promise.all([this.tree.load(), this.#watch(tenant), this.#listen(tenant)]);
    } catch (error) {
      if (tenant === this.#tenant && tenant.status.state !== "closed") complain(error);
    }
  }

  async refreshInfo(): Promise<void> {
    if (this.site.leaving) return;
    try {
      this.info.value = await this.#tenant.info();
    } catch {
      // the connection's state shows it
    }
  }

  async #watch(tenant: Tenant): Promise<void> {
    if (!allows("files:read")) return;
    const watch = await tenant.watch(["."]);
    void (async () => {
      try {
        for await (const changes of watch) {
          this.tree.changed(changes);
          this.files.changed(changes);
          this.documents.changed(changes);
          this.servers.changed(changes);
        }
      } catch (error) {
        if (tenant === this.#tenant && tenant.status.state !== "closed") complain(error, "Watching files");
      }
    })();
  }

  async #listen(tenant: Tenant): Promise<void> {
    if (!allows("events")) return;
    const now = await tenant.request<{ subscription: number; lastEventId: number }>("events/subscribe", {});
    await tenant.request("events/unsubscribe", { subscription: now.subscription });
    const events = await tenant.events({ lastEventId: Math.max(0, now.lastEventId - EARLIER) });
    void (async () => {
      try {
        for await (const event of events) {
          this.activity.take(event);
          this.deploys.take(event);
          this.history.take(event);
          this.terminals.take(event);
          this.agent.take(event);
          if (event.type === "file.written") this.#written(event.data);
          const told = event.type.startsWith("tenant.") || event.type === "deployment.succeeded";
          // a destroyed tenant has no info
          if (told && event.type !== "tenant.destroyed") void this.refreshInfo();
        }
      } catch (error) {
        if (!(error instanceof GatewayError)) complain(error);
      }
    })();
  }

  #written({ path, by }: Readonly<Record<string, unknown>>): void {
    const written = relative(String(path), this.server.value?.workspace ?? "/srv/site");
    if (written !== null && by !== who()) this.documents.written(written, String(by ?? ""));
  }

  /** Starts the tenant; events report what it runs. */
  async start(): Promise<void> {
    this.starting.value = true;
    try {
      this.info.value = await this.#tenant.start();
    } catch (error) {
      complain(error, "Starting the tenant");
    } finally {
      this.starting.value = false;
    }
  }

  /** Reconnects if the session has ended and a new one exists. */
  #goOn(): void {
    const { state, error } = this.#tenant.status;
    if (state !== "unauthorized" && error?.code !== "unauthorized") return;
    const now = Date.now();
    if (now - this.#wentOn < 2000) {
      // HTTP knows the session and the websocket does not yet: do not retry in a tight loop
      const timer = setTimeout(() => session.value && this.#goOn(), 2000);
      this.#stops.push(() => clearTimeout(timer));
      return;
    }
    this.#wentOn = now;
    if (state === "unauthorized") this.#tenant.retry();
    else if (state === "closed") this.reconnect();
  }

  /** Signs in with another token and continues. Throws if it does not cover this tenant. */
  async renew(token: string): Promise<void> {
    const found = await identify(token);
    if (!covers(found, this.name)) {
      const names = found.tenants.join(", ");
      throw new GatewayError(
        "forbidden",
        `This token opens ${names}, not ${this.name}. Use one for ${this.name}.`,
      );
    }
    await signIn(token, found);
    if (this.status.value.state !== "open") return; // `#goOn` continues
    // another person's token needs a new connection
    await this.#tenant.renew(token).catch(() => this.#tenant.reconnect());
  }

  /** Reconnects with the present session of the browser; unsaved text stays. */
  reconnect(): void {
    this.#tenant.close();
    this.#tenant = gateway.tenant(this.name, { insist: true });
    void this.#begin().then(() => {
      this.tree.refresh();
      this.documents.changed({ changes: [], overflow: true });
    });
  }

  /** Closes everything; unsaved text is given up. */
  dispose(): void {
    for (const doc of this.documents.tabs.open.value) if (doc.dirty.value) this.#drafts.drop(doc.path);
    void this.#drafts.flush();
    for (const stop of this.#stops.splice(0)) stop();
    this.servers.dispose();
    this.terminals.dispose();
    this.agent.dispose();
    this.deploys.dispose();
    this.#tenant.close();
  }
}

export const workspace = signal<Workspace | null>(null);
export const tenants = signal<readonly TenantInfo[]>([]);

const LAST = "gateway.tenant";

export async function listTenants(): Promise<void> {
  try {
    tenants.value = await gateway.tenants();
  } catch (error) {
    complain(error, "Listing tenants");
  }
}

/** Opens a tenant; the caller must have asked about unsaved text. */
export function openTenant(name: string, file: string | null = null): void {
  if (workspace.value?.name === name) return;
  workspace.value?.dispose();
  localStorage.setItem(LAST, name);
  const opened = new Workspace(name);
  workspace.value = opened;
  void opened.restore(file);
}

/** Closes the open tenant; the caller must have asked about unsaved text. */
export function leaveTenant(): void {
  workspace.value?.dispose();
  workspace.value = null;
  tenants.value = [];
}

/** Opens the tenant in the address if the session covers it, otherwise the last one, otherwise the first. */
export async function openFirst(wanted: string | null, file: string | null): Promise<void> {
  if (wanted !== null && session.value && covers(session.value, wanted)) {
    openTenant(wanted, file);
    void listTenants();
    return;
  }
  await listTenants();
  const last = localStorage.getItem(LAST);
  const found = tenants.value.find(({ name }) => name === last) ?? tenants.value[0];
  if (found !== undefined) openTenant(found.name);
}

addEventListener("beforeunload", (event) => {
  if (workspace.value?.leave() === false) event.preventDefault();
});
// a tab that crashes, or that the system ends, fires no later event
addEventListener("visibilitychange", () => workspace.value?.leave());
