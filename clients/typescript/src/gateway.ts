/** A gateway: the session, its tenants, deployments and event stream. */

import type { SocketConstructor } from "./connection.js";
import { Credential, type TokenSource } from "./credential.js";
import { Deployment, type DeploymentRequest, templateBody } from "./deployment.js";
import { GatewayError } from "./errors.js";
import { HttpClient } from "./http.js";
import { Tenant, type TenantOptions } from "./tenant.js";
import type {
  AuditEntry,
  DeploymentRecord,
  DeploymentStarted,
  GatewayEvent,
  Session,
  TemplateInfo,
  TenantInfo,
} from "./types.js";
import { unique } from "./unique.js";
import { EventParser } from "./wire.js";

export interface GatewayOptions {
  /**
   * Sent as bearer and in `initialize`; a browser with the session's cookie needs none. A function is called for each
   * new connection, before its last token ends, and once more if the gateway refuses that one.
   */
  readonly token?: TokenSource | undefined;
  /** Names one of several sessions in a browser, each with its own cookie: `[a-z0-9]{1,32}`. */
  readonly slot?: string | undefined;
  readonly client?: { readonly name: string; readonly version: string } | undefined;
  /** A WebSocket for a runtime without one. On Node 20, `ws` is used if it is installed. */
  readonly WebSocket?: SocketConstructor | undefined;
  readonly fetch?: typeof fetch | undefined;
}

export interface EventFilter {
  readonly tenants?: readonly string[] | undefined;
  readonly deployments?: readonly string[] | undefined;
  /** May end in `*`. */
  readonly types?: readonly string[] | undefined;
  /** Opaque text: the `id:` of a stream, which in a cluster is not the event's own `id`. */
  readonly lastEventId?: string | number | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Called with false when the stream breaks, and with true when it is back. */
  readonly onConnected?: ((connected: boolean) => void) | undefined;
  /** Keep trying if the first connection fails, instead of throwing at once. */
  readonly insist?: boolean | undefined;
}

// the gateway sends a comment every 15 s; after four missing ones the connection is dead
const SILENCE = 60_000;

export class Gateway extends HttpClient {
  readonly identity: { readonly name: string; readonly version: string };
  readonly #socket: SocketConstructor | undefined;

  /** `url` is `https://HOST` or `http://HOST:PORT`; in a browser the default is the page's own. */
  constructor(url = globalThis.location?.origin, options: GatewayOptions = {}) {
    if (!/^https?:\/\/[^/]/.test(url ?? ""))
      throw new TypeError(`a gateway's address is http(s)://…, not ${url}`);
    const credential = new Credential(options.token);
    super(url.replace(/\/+$/, ""), credential, options.slot ?? null, options.fetch);
    this.identity = options.client ?? { name: "@incus-gateway/client", version: "0.1.0" };
    this.#socket = options.WebSocket;
  }

  // --- the session -----------------------------------------------------------------------------------------

  /** Stores the token in the browser as a cookie that no script can read, in this object's `slot`. */
  signIn(token: string, signal?: AbortSignal): Promise<Session> {
    const slot = this.slot === null ? {} : { slot: this.slot };
    return this.json("POST", "/v1/session", { token, ...slot }, { signal });
  }

  /** Returns what the cookie or token grants. Throws `unauthorized` without one. */
  session(signal?: AbortSignal): Promise<Session> {
    return this.#get("/v1/session", signal);
  }

  async signOut(signal?: AbortSignal): Promise<void> {
    await this.http("DELETE", "/v1/session", { signal });
  }

  // --- tenants ---------------------------------------------------------------------------------------------

  /** Returns the tenants that the token covers. */
  async tenants(signal?: AbortSignal): Promise<readonly TenantInfo[]> {
    return (await this.#get<{ tenants: TenantInfo[] }>("/v1/tenants", signal)).tenants;
  }

  /** Returns the templates that can be deployed by name; one with `error` cannot. */
  async templates(signal?: AbortSignal): Promise<readonly TemplateInfo[]> {
    return (await this.#get<{ templates: TemplateInfo[] }>("/v1/templates", signal)).templates;
  }

  /** Returns a tenant. It connects on the first request, and each has its own connection. */
  tenant(name: string, options: TenantOptions = {}): Tenant {
    const path = `/v1/tenants/${encodeURIComponent(name)}/ws`;
    return new Tenant(this, name, this.identity, options, {
      address: this.url,
      url: () => `ws${this.url.slice(4)}${path}${this.slot === null ? "" : `?slot=${this.slot}`}`,
      socket: () => this.#socketKind(),
      other: (other) => this.tenant(other, options),
      deployment: (started) => new Deployment(this, started),
    });
  }

  async #socketKind(): Promise<SocketConstructor> {
    if (this.#socket !== undefined) return this.#socket;
    if (typeof globalThis.WebSocket === "function")
      return globalThis.WebSocket as unknown as SocketConstructor;
    try {
      // not as an import: bundlers would look for it, or refuse a name that they cannot see
      const { createRequire } = process.getBuiltinModule("node:module");
      const module = createRequire(import.meta.url)("ws") as { WebSocket: SocketConstructor };
      return module.WebSocket;
    } catch {
      throw new GatewayError(
        "invalid_params",
        "this runtime has no WebSocket: use Node 22, install the package ws (Node 20.16), or give one as `WebSocket`",
      );
    }
  }

  // --- deployments -----------------------------------------------------------------------------------------

  /**
   * Begins to deploy a site at a domain, or to update it. A second call with the same `idempotencyKey` returns the same
   * deployment.
   */
  async deploy(
    request: DeploymentRequest,
    idempotencyKey: string = unique(),
    signal?: AbortSignal,
  ): Promise<Deployment> {
    const headers = { "Idempotency-Key": idempotencyKey };
    const body = { ...request, template: templateBody(request.template) };
    const started = await this.json<DeploymentStarted>("POST", "/v1/deployments", body, { headers, signal });
    return new Deployment(this, started);
  }

  /** Returns a deployment by its id. */
  async deployment(id: string, signal?: AbortSignal): Promise<Deployment> {
    return new Deployment(this, await this.#get(`/v1/deployments/${encodeURIComponent(id)}`, signal));
  }

  /** Returns the newest deployments of the tenants that the token covers. */
  async deployments(signal?: AbortSignal): Promise<readonly DeploymentRecord[]> {
    return (await this.#get<{ deployments: DeploymentRecord[] }>("/v1/deployments", signal)).deployments;
  }

  // --- for operators ---------------------------------------------------------------------------------------

  /** Revokes the token with this `jti`; needs the scope `admin` for every tenant. */
  async revoke(
    tokenId: string,
    options: {
      /** The token's `exp`, until which the gateway keeps the revocation. Default: forever. */
      readonly expires?: number | undefined;
      readonly signal?: AbortSignal | undefined;
    } = {},
  ): Promise<void> {
    const { expires, signal } = options;
    await this.json("POST", "/v1/revocations", { id: tokenId, expires }, { signal });
  }

  /** Returns who did what, newest first; needs the scope `admin` for every tenant. */
  async audit(
    options: {
      readonly tenant?: string | undefined;
      /** Default 100, at most 1000. */
      readonly limit?: number | undefined;
      /** Only entries before the one with this id; in a cluster, also name its `member`. */
      readonly before?: number | undefined;
      readonly member?: string | undefined;
      readonly signal?: AbortSignal | undefined;
    } = {},
  ): Promise<readonly AuditEntry[]> {
    const { tenant, limit = 100, before, member, signal } = options;
    const query = new URLSearchParams();
    if (tenant !== undefined) query.set("tenant", tenant);
    query.set("limit", String(limit));
    if (before !== undefined) query.set("before", String(before));
    if (member !== undefined) query.set("member", member);
    return (await this.#get<{ entries: AuditEntry[] }>(`/v1/audit?${query}`, signal)).entries;
  }

  #get<Result>(path: string, signal: AbortSignal | undefined): Promise<Result> {
    return this.json("GET", path, undefined, { signal });
  }

  // --- events ----------------------------------------------------------------------------------------------

  /**
   * Yields events as they happen, until `signal` aborts. A broken stream is resumed after the last event seen; an event
   * `gap` says that some are lost, so that the state must be read again. It uses `fetch`, since `EventSource` cannot
   * send a bearer token and delivers only types that are known in advance.
   */
  async *events(filter: EventFilter = {}): AsyncGenerator<GatewayEvent> {
    const query = new URLSearchParams();
    if (filter.tenants) query.set("tenant", filter.tenants.join(","));
    if (filter.deployments) query.set("deployment", filter.deployments.join(","));
    if (filter.types) query.set("type", filter.types.join(","));
    let last = filter.lastEventId === undefined ? "" : String(filter.lastEventId);
    let begun = filter.insist ?? false;
    for (let failures = 0; ; failures++) {
      if (filter.signal?.aborted) return;
      if (failures > 0)
        await pause(
          Math.min(8000, 250 * 2 ** Math.min(failures, 16)) * (0.5 + Math.random() / 2),
          filter.signal,
        );
      const ending = new AbortController();
      const abort = () => ending.abort();
      filter.signal?.addEventListener("abort", abort);
      let silence: ReturnType<typeof setTimeout> | undefined;
      const heard = () => {
        clearTimeout(silence);
        silence = setTimeout(abort, SILENCE);
      };
      try {
        heard();
        const response = await this.http("GET", `/v1/events?${query}`, {
          headers: { Accept: "text/event-stream", ...(last === "" ? {} : { "Last-Event-ID": last }) },
          signal: ending.signal,
        });
        if (response.body === null) return;
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        const parser = new EventParser();
        begun = true;
        filter.onConnected?.(true);
        for (;;) {
          const { done, value } = await reader.read();
          if (done) break;
          heard();
          for (const sent of parser.feed(value)) {
            last = sent.id || last;
            failures = 0;
            yield JSON.parse(sent.data) as GatewayEvent;
          }
          last = parser.lastId || last; // also of a stream that breaks before its first event
        }
      } catch (error) {
        if (filter.signal?.aborted) return;
        if (!begun || (error instanceof GatewayError && !error.retriable && error.code !== "cancelled"))
          throw error;
      } finally {
        clearTimeout(silence);
        filter.signal?.removeEventListener("abort", abort);
        ending.abort();
      }
      filter.onConnected?.(false);
    }
  }
}

function pause(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    signal?.addEventListener("abort", end);
  });
}
