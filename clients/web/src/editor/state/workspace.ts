/** Knows the tenant that is open: its connection, and all that is shown of it. */

import { effect, signal } from "@preact/signals";
import {
  GatewayError,
  type LinkStatus,
  type ServerInfo,
  type Tenant,
  type TenantInfo,
} from "../../client/index.js";
import { Activity } from "./activity.js";
import { Deploys } from "./deploys.js";
import { Documents } from "./documents.js";
import { Insights } from "./insights.js";
import { Search } from "./search.js";
import { allows, gateway, session, writeAddress } from "./session.js";
import { Terminals } from "./terminals.js";
import { complain } from "./toasts.js";
import { Tree } from "./tree.js";

/** How many events of before are asked for; ids grow by one with each. */
const HISTORY = 1500;

interface Kept {
  readonly open?: readonly string[];
  readonly active?: string | null;
  readonly folders?: readonly string[];
}

export class Workspace {
  #tenant: Tenant;
  readonly status = signal<LinkStatus>({
    state: "idle",
    attempt: 0,
    retryAt: null,
    error: null,
    latency: null,
  });
  readonly server = signal<ServerInfo | null>(null);
  readonly info = signal<TenantInfo | null>(null);
  readonly tree: Tree;
  readonly documents: Documents;
  readonly terminals: Terminals;
  readonly activity: Activity;
  readonly deploys = new Deploys();
  readonly insights: Insights;
  readonly search: Search;
  readonly #stops: (() => void)[] = [];
  readonly #key: string;

  constructor(readonly name: string) {
    this.#key = `gateway.open.${name}`;
    const kept = this.#kept();
    const tenant = () => this.#tenant;
    this.#tenant = gateway.tenant(name);
    this.tree = new Tree(tenant, kept.folders ?? []);
    this.documents = new Documents(tenant, () => !allows("files:write"));
    this.terminals = new Terminals(tenant, name);
    this.activity = new Activity(() => this.server.value?.workspace ?? "/srv/site");
    this.insights = new Insights(tenant);
    this.search = new Search(tenant);
    this.activity.onWritten = (path) => void this.documents.show(path);
    this.#stops.push(
      effect(() => {
        const open = this.documents.open.value.map(({ path }) => path);
        const active = this.documents.active.value?.path ?? null;
        const value: Kept = { open, active, folders: this.tree.rows.value && this.tree.open };
        sessionStorage.setItem(this.#key, JSON.stringify(value));
        writeAddress(name, active);
      }),
    );
    void this.#begin();
  }

  #kept(): Kept {
    try {
      return (JSON.parse(sessionStorage.getItem(this.#key) ?? "{}") ?? {}) as Kept;
    } catch {
      return {};
    }
  }

  get tenant(): Tenant {
    return this.#tenant;
  }

  /** Opens again what was open when the page was left. */
  async restore(file: string | null): Promise<void> {
    const { open = [], active = null } = this.#kept();
    for (const path of open) await this.documents.show(path);
    const wanted = file ?? active;
    if (wanted !== null) {
      await this.documents.show(wanted);
      void this.tree.reveal(wanted);
    }
  }

  async #begin(): Promise<void> {
    const tenant = this.#tenant;
    this.#stops.push(
      tenant.onStatus((status) => {
        if (tenant !== this.#tenant) return;
        const before = this.status.value.state;
        this.status.value = status;
        if (status.state === "closed" && status.error?.code === "unauthorized") session.value = null;
        // `usage` and address may be others after a break
        if (status.state === "open" && before !== "open") void this.refreshInfo();
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
    try {
      this.info.value = await this.#tenant.info();
    } catch {
      // the state of the connection says it
    }
  }

  async #watch(tenant: Tenant): Promise<void> {
    if (!allows("files:read")) return;
    const watch = await tenant.watch(["."]);
    void (async () => {
      try {
        for await (const changes of watch) {
          this.tree.changed(changes);
          this.documents.changed(changes);
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
    const events = await tenant.events({ lastEventId: Math.max(0, now.lastEventId - HISTORY) });
    void (async () => {
      try {
        for await (const event of events) {
          this.activity.take(event);
          this.deploys.take(event);
          if (event.type.startsWith("tenant.") || event.type === "deployment.succeeded")
            void this.refreshInfo();
        }
      } catch (error) {
        if (!(error instanceof GatewayError)) complain(error);
      }
    })();
  }

  /** Connects anew with what the browser is signed in as now; unsaved text stays. */
  reconnect(): void {
    this.#tenant.close();
    this.#tenant = gateway.tenant(this.name);
    void this.#begin().then(() => {
      this.tree.refresh();
      this.documents.changed({ changes: [], overflow: true });
    });
  }

  dispose(): void {
    for (const stop of this.#stops.splice(0)) stop();
    this.terminals.dispose();
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

/** Opens a tenant; the caller has asked about unsaved text. */
export function openTenant(name: string, file: string | null = null): void {
  if (workspace.value?.name === name) return;
  workspace.value?.dispose();
  localStorage.setItem(LAST, name);
  const opened = new Workspace(name);
  workspace.value = opened;
  void opened.restore(file);
}

/** Opens the tenant of the address, else the last one, else the first. */
export async function openFirst(wanted: string | null, file: string | null): Promise<void> {
  if (wanted !== null) {
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
  if (workspace.value?.documents.dirty) event.preventDefault();
});
