/** A gateway as a whole: who we are to it, its tenants, deployments and event stream. */

import type { SocketConstructor } from "./connection.js";
import { Credential, type TokenSource } from "./credential.js";
import { GatewayError } from "./errors.js";
import { HttpClient } from "./http.js";
import { Tenant, type TenantOptions } from "./tenant.js";
import type { DeploymentInfo, GatewayEvent, Session, TemplateInfo, TenantInfo } from "./types.js";
import { unique } from "./unique.js";
import { EventParser } from "./wire.js";

export interface GatewayOptions {
  /**
   * Sent as bearer and in `initialize`; a browser with the session's cookie needs none. A function is asked with each
   * new connection, before the end of the token that it gave last, and once more where the gateway refuses that one.
   */
  readonly token?: TokenSource;
  /** Names one of several sessions of a browser, each with a cookie of its own: `[a-z0-9]{1,32}`. */
  readonly slot?: string;
  readonly client?: { readonly name: string; readonly version: string };
  /** A WebSocket for a runtime without one: Node 20, where `ws` is taken if it is installed. */
  readonly WebSocket?: SocketConstructor;
  readonly fetch?: typeof fetch;
}

export interface EventFilter {
  readonly tenants?: readonly string[];
  readonly deployments?: readonly string[];
  /** May end in `*`. */
  readonly types?: readonly string[];
  readonly lastEventId?: string | number;
  readonly signal?: AbortSignal;
  /** Called with false when the stream broke and with true when it is there again. */
  readonly onConnected?: (connected: boolean) => void;
}

export interface DeploymentRequest {
  readonly domain: string;
  readonly template: string;
  readonly size?: string;
  readonly env?: Readonly<Record<string, string>>;
  readonly tenant?: string;
}

// a comment comes every 15 s; four of them missing is a dead connection
const SILENCE = 60_000;

export class Gateway extends HttpClient {
  readonly identity: { readonly name: string; readonly version: string };
  readonly #socket: SocketConstructor | undefined;

  /** `url` is `https://HOST` or `http://HOST:PORT`; in a browser it may be left out for the page's own. */
  constructor(url = globalThis.location?.origin, options: GatewayOptions = {}) {
    if (!/^https?:\/\/[^/]/.test(url ?? ""))
      throw new TypeError(`a gateway's address is http(s)://…, not ${url}`);
    const credential = new Credential(options.token);
    super(url.replace(/\/+$/, ""), credential, options.slot ?? null, options.fetch);
    this.identity = options.client ?? { name: "@incus-gateway/client", version: "0.1.0" };
    this.#socket = options.WebSocket;
  }

  // --- who we are ------------------------------------------------------------------------------------------

  /** Has the browser keep the token as a cookie that no script can read, in the `slot` of this object. */
  signIn(token: string): Promise<Session> {
    const slot = this.slot === null ? {} : { slot: this.slot };
    return this.json("POST", "/v1/session", { token, ...slot });
  }

  /** Returns what the cookie or token grants. Throws `unauthorized` where there is none. */
  session(): Promise<Session> {
    return this.json("GET", "/v1/session");
  }

  async signOut(): Promise<void> {
    await this.http("DELETE", "/v1/session");
  }

  // --- tenants ---------------------------------------------------------------------------------------------

  async tenants(): Promise<readonly TenantInfo[]> {
    return (await this.json<{ tenants: TenantInfo[] }>("GET", "/v1/tenants")).tenants;
  }

  /** Returns what can be deployed by name; one with `error` cannot. */
  async templates(): Promise<readonly TemplateInfo[]> {
    return (await this.json<{ templates: TemplateInfo[] }>("GET", "/v1/templates")).templates;
  }

  /** Returns a tenant to work with; it connects when something is asked, and each has its own connection. */
  tenant(name: string, options: TenantOptions = {}): Tenant {
    const path = `/v1/tenants/${encodeURIComponent(name)}/ws`;
    return new Tenant(this, name, this.identity, options, {
      address: this.url,
      url: () => `ws${this.url.slice(4)}${path}${this.slot === null ? "" : `?slot=${this.slot}`}`,
      socket: () => this.#socketKind(),
    });
  }

  async #socketKind(): Promise<SocketConstructor> {
    if (this.#socket !== undefined) return this.#socket;
    if (typeof globalThis.WebSocket === "function")
      return globalThis.WebSocket as unknown as SocketConstructor;
    try {
      const name = "ws"; // not for a bundler to see: browsers have their own
      const module = (await import(/* @vite-ignore */ name)) as { WebSocket: SocketConstructor };
      return module.WebSocket;
    } catch {
      throw new GatewayError(
        "invalid_params",
        "this runtime has no WebSocket: use Node 22, install the package ws, or give one as `WebSocket`",
      );
    }
  }

  // --- deployments -----------------------------------------------------------------------------------------

  /** Starts a deployment. The same `idempotencyKey` again is the same deployment. */
  async deploy(request: DeploymentRequest, idempotencyKey: string = unique()): Promise<Deployment> {
    const headers = { "Idempotency-Key": idempotencyKey };
    const info = await this.json<DeploymentInfo>("POST", "/v1/deployments", request, { headers });
    return new Deployment(this, info);
  }

  async deployment(id: string): Promise<Deployment> {
    return new Deployment(this, await this.json("GET", `/v1/deployments/${encodeURIComponent(id)}`));
  }

  // --- events ----------------------------------------------------------------------------------------------

  /**
   * Yields events as they happen, until `signal` aborts. A broken stream is resumed after the last event that
   * was seen; an event `gap` says that some are gone, and that the state is to be read anew. By `fetch` and
   * not by `EventSource`, which can send no bearer and hands out only types that are known beforehand.
   */
  async *events(filter: EventFilter = {}): AsyncGenerator<GatewayEvent> {
    const query = new URLSearchParams();
    if (filter.tenants) query.set("tenant", filter.tenants.join(","));
    if (filter.deployments) query.set("deployment", filter.deployments.join(","));
    if (filter.types) query.set("type", filter.types.join(","));
    let last = filter.lastEventId === undefined ? "" : String(filter.lastEventId);
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
        }
      } catch (error) {
        if (filter.signal?.aborted) return;
        if (error instanceof GatewayError && !error.retriable && error.code !== "cancelled") throw error;
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

/** What fails or is cancelled is undone first, and ends by that. */
const ENDINGS = new Set(["deployment.succeeded", "deployment.rolledback"]);

/** One attempt to bring a tenant to a site that answers. */
export class Deployment {
  readonly id: string;
  readonly tenant: string;
  readonly #gateway: Gateway;

  /** @internal Use `Gateway.deploy` and `Gateway.deployment`. */
  constructor(
    gateway: Gateway,
    readonly started: DeploymentInfo,
  ) {
    this.#gateway = gateway;
    this.id = started.id;
    this.tenant = started.tenant;
  }

  info(): Promise<DeploymentInfo> {
    return this.#gateway.json("GET", `/v1/deployments/${encodeURIComponent(this.id)}`);
  }

  /** Cancels it and rolls back what was done. */
  async cancel(): Promise<void> {
    await this.#gateway.http("DELETE", `/v1/deployments/${encodeURIComponent(this.id)}`);
  }

  /** Yields its events from the first kept one on, and ends after the one that tells how it ended. */
  async *events(signal?: AbortSignal): AsyncGenerator<GatewayEvent> {
    const options = signal === undefined ? {} : { signal };
    for await (const event of this.#gateway.events({ deployments: [this.id], lastEventId: 0, ...options })) {
      yield event;
      if (ENDINGS.has(event.type)) return;
    }
  }
}
