/** A tenant's lifecycle and its site, over HTTP. */

import type { Deployment } from "./deployment.js";
import { GatewayError } from "./errors.js";
import type { HttpClient } from "./http.js";
import type { LinkOptions } from "./link.js";
import { Tools } from "./tools.js";
import type {
  AgentToken,
  DeploymentHistory,
  DeploymentStarted,
  Listening,
  Move,
  SiteAnswer,
  SnapshotInfo,
  TenantInfo,
  TenantSize,
  Usage,
} from "./types.js";
import { unique } from "./unique.js";

/** Milliseconds between two looks at a move. */
const LOOK = 250;
const AWAY: ReadonlySet<string> = new Set(["unavailable", "not_found"]);

export interface Logs {
  readonly lines?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Options of a new deployment: a second call with the same key returns the same deployment. */
export interface BeginOptions {
  readonly idempotencyKey?: string | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** The gateway that the tenant belongs to. */
export type Place<Twin> = Pick<LinkOptions, "address" | "url" | "socket"> & {
  readonly other: (name: string) => Twin;
  readonly deployment: (started: DeploymentStarted) => Deployment;
};

/** `Twin` is the type of the tenant that `clone` returns. */
export abstract class Lifecycle<Twin> extends Tools {
  readonly name: string;
  protected readonly http: HttpClient;
  protected readonly place: Place<Twin>;

  constructor(http: HttpClient, name: string, place: Place<Twin>) {
    super();
    this.name = name;
    this.http = http;
    this.place = place;
  }

  abstract close(): void;

  info(signal?: AbortSignal): Promise<TenantInfo> {
    return this.http.json("GET", this.path(), undefined, { signal });
  }

  metrics(signal?: AbortSignal): Promise<Usage> {
    return this.http.json("GET", this.path("/metrics"), undefined, { signal });
  }

  /** Checks whether the tenant's site answers now; `answers` is null if it has none or sleeps. */
  site(signal?: AbortSignal): Promise<SiteAnswer> {
    return this.http.json("GET", this.path("/site"), undefined, { signal });
  }

  /** Returns where processes of the tenant listen, by port. */
  async ports(signal?: AbortSignal): Promise<readonly Listening[]> {
    const found = await this.http.json<{ ports: Listening[] }>("GET", this.path("/ports"), undefined, {
      signal,
    });
    return found.ports;
  }

  /** Returns a token for an agent's server: for this tenant alone, and no longer than the one in use here. */
  agentToken(signal?: AbortSignal): Promise<AgentToken> {
    return this.http.json("POST", this.path("/agent-token"), undefined, { signal });
  }

  start(signal?: AbortSignal): Promise<TenantInfo> {
    return this.http.json("POST", this.path("/start"), undefined, { signal });
  }

  stop(signal?: AbortSignal): Promise<TenantInfo> {
    return this.http.json("POST", this.path("/stop"), undefined, { signal });
  }

  /** Stops the tenant until it is used again; throws `conflict` if it is in use. */
  sleep(signal?: AbortSignal): Promise<TenantInfo> {
    return this.http.json("POST", this.path("/sleep"), undefined, { signal });
  }

  restart(signal?: AbortSignal): Promise<TenantInfo> {
    return this.http.json("POST", this.path("/restart"), undefined, { signal });
  }

  /** Changes the tenant's domain, or removes it; its name stays. */
  rename(domain: string | null, signal?: AbortSignal): Promise<TenantInfo> {
    return this.http.json("PATCH", this.path(), { domain }, { signal });
  }

  /** Changes the tenant's limits to those of another size while it runs. */
  resize(size: TenantSize, signal?: AbortSignal): Promise<TenantInfo> {
    return this.http.json("PATCH", this.path(), { size }, { signal });
  }

  /**
   * Moves the tenant to another server of the cluster, by default the one with most room, and resolves once it runs
   * there; for operators. Calls wait for some seconds meanwhile, and running commands end. Throws the reason if the
   * tenant stays where it is.
   */
  async move(member?: string, signal?: AbortSignal): Promise<Move> {
    const begun: Move = await this.http.json("POST", this.path("/move"), { member }, { signal });
    let last = begun;
    while (last.id !== begun.id || (last.state !== "moved" && last.state !== "failed")) {
      await new Promise((resolve) => setTimeout(resolve, LOOK));
      try {
        last = await this.lastMove(signal);
      } catch (error) {
        // it may be on its way right now
        if (!(error instanceof GatewayError && AWAY.has(error.code))) throw error;
      }
    }
    if (last.state === "failed") {
      const { message, code: _, ...facts } = last.error ?? {};
      throw new GatewayError("unavailable", String(message), facts);
    }
    return last;
  }

  /** Returns the move that is under way, or the last one; throws `not_found` if there was none. */
  lastMove(signal?: AbortSignal): Promise<Move> {
    return this.http.json("GET", this.path("/move"), undefined, { signal });
  }

  /** Makes another tenant of this one's disk, or of a snapshot of it; it has no domain yet. */
  async clone(
    tenant: string,
    options: { readonly snapshot?: string | undefined; readonly signal?: AbortSignal | undefined } = {},
  ): Promise<Twin> {
    const { snapshot, signal } = options;
    await this.http.json("POST", this.path("/clone"), { tenant, snapshot }, { signal });
    return this.place.other(tenant);
  }

  /** Returns the snapshots of the disk, oldest first. */
  async snapshots(signal?: AbortSignal): Promise<readonly SnapshotInfo[]> {
    const path = this.path("/snapshots");
    return (await this.http.json<{ snapshots: SnapshotInfo[] }>("GET", path, undefined, { signal }))
      .snapshots;
  }

  /** Takes a snapshot of the disk; the default name is the time. */
  snapshot(name?: string, signal?: AbortSignal): Promise<SnapshotInfo> {
    return this.http.json("POST", this.path("/snapshots"), { name }, { signal });
  }

  /** Restores the disk: stops the tenant, and starts it again if it ran. */
  async restore(snapshot: string, signal?: AbortSignal): Promise<void> {
    const path = this.path(`/snapshots/${encodeURIComponent(snapshot)}/restore`);
    await this.http.json("POST", path, undefined, { signal });
  }

  async deleteSnapshot(snapshot: string, signal?: AbortSignal): Promise<void> {
    const path = this.path(`/snapshots/${encodeURIComponent(snapshot)}`);
    await this.http.json("DELETE", path, undefined, { signal });
  }

  /** Returns its deployments, which one is live, and those it can go back to. */
  deployments(signal?: AbortSignal): Promise<DeploymentHistory> {
    return this.http.json("GET", this.path("/deployments"), undefined, { signal });
  }

  /** Begins to build the site for production and serve it at another domain, in a separate tenant. */
  publish(
    domain: string,
    options: BeginOptions & {
      /** Of a new tenant; default `small`. */
      readonly size?: TenantSize | undefined;
      /** The environment of the published site. */
      readonly env?: Readonly<Record<string, string>> | undefined;
      /** Its tenant; default: derived from the domain. */
      readonly tenant?: string | undefined;
      /** What serves it; default: detected. */
      readonly start?: string | readonly string[] | undefined;
      /** What installs and builds it; default: detected. */
      readonly install?: string | readonly string[] | undefined;
    } = {},
  ): Promise<Deployment> {
    const { size = "small", env, tenant, start, install, ...begin } = options;
    return this.#begin("POST", "/publish", { domain, size, env, tenant, start, install }, begin);
  }

  /** Begins to go back to a kept site: the one live before, or that of the deployment `to`. */
  rollback(to?: string, options: BeginOptions = {}): Promise<Deployment> {
    return this.#begin("POST", "/rollback", { to }, options);
  }

  /** Returns the names of the site's environment variables. */
  async variables(signal?: AbortSignal): Promise<readonly string[]> {
    const path = this.path("/env");
    return (await this.http.json<{ names: string[] }>("GET", path, undefined, { signal })).names;
  }

  /** Returns the site's environment with its values; needs the scope `exec` too. */
  async environment(signal?: AbortSignal): Promise<Readonly<Record<string, string>>> {
    const path = this.path("/env?values=1");
    return (await this.http.json<{ env: Record<string, string> }>("GET", path, undefined, { signal })).env;
  }

  /** Begins to restart the site with changed variables; null removes one. */
  changeEnvironment(
    env: Readonly<Record<string, string | null>>,
    options: BeginOptions = {},
  ): Promise<Deployment> {
    return this.#begin("PATCH", "/env", { env }, options);
  }

  async #begin(method: string, rest: string, body: object, options: BeginOptions): Promise<Deployment> {
    const { idempotencyKey = unique(), signal } = options;
    const headers = { "Idempotency-Key": idempotencyKey };
    const asked = { headers, signal };
    return this.place.deployment(await this.http.json(method, this.path(rest), body, asked));
  }

  /** Destroys the tenant with all its files and snapshots, and closes this connection. */
  async delete(signal?: AbortSignal): Promise<void> {
    await this.http.json("DELETE", this.path(), undefined, { signal });
    this.close();
  }

  /** Yields the lines of the site's journal, the last `lines` first; ends when it does not follow. */
  async *logs(options: Logs & { follow?: boolean } = {}): AsyncGenerator<string> {
    const query = new URLSearchParams({
      lines: String(options.lines ?? 200),
      follow: options.follow ? "1" : "0",
    });
    const response = await this.http.http("GET", this.path(`/logs?${query}`), {
      signal: options.signal,
    });
    yield* lines(response);
  }

  protected path(rest = ""): string {
    return `/v1/tenants/${encodeURIComponent(this.name)}${rest}`;
  }
}

async function* lines(response: Response): AsyncGenerator<string> {
  if (response.body === null) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop() ?? "";
      yield* parts;
    }
    if (rest !== "") yield rest;
  } finally {
    await reader.cancel().catch(() => {});
  }
}
