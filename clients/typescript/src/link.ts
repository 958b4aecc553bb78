/** Stays connected to one tenant: back-off, repeated requests, connection state. */

import { type Backoff, pause } from "./backoff.js";
import { Browser, unreachable } from "./browser.js";
import { Connection, type SocketConstructor } from "./connection.js";
import type { Credential } from "./credential.js";
import { Emitter } from "./emitter.js";
import { Disconnected, GatewayError, signedOut } from "./errors.js";
import { Renewal } from "./renewal.js";
import type { Renewed, ServerInfo } from "./types.js";
import { Waiters } from "./waiters.js";
import type { Notification } from "./wire.js";

/**
 * `idle` before the first request, and after the first connection failed; `connecting` for the first time; `open`;
 * `reconnecting` after a break, or `offline` if the browser reports no network; `draining` when the gateway is shutting
 * down; `unauthorized` when the browser's session has ended, until it signs in and `retry` is called; `closed` finally,
 * by us or by a refusal that is permanent.
 */
export type LinkState =
  | "idle"
  | "connecting"
  | "open"
  | "reconnecting"
  | "offline"
  | "draining"
  | "unauthorized"
  | "closed";

export interface LinkStatus {
  readonly state: LinkState;
  /** How many attempts failed since the connection was last open. */
  readonly attempt: number;
  /** When the next attempt is made, in milliseconds since the epoch. */
  readonly retryAt: number | null;
  /** Why there is no connection; while there is one, why its token could not be renewed. */
  readonly error: GatewayError | null;
  /** When the connection's token ends, in seconds since the epoch. */
  readonly expires: number | null;
  /** The round trip of the last heartbeat, in milliseconds. */
  readonly latency: number | null;
}

/** Something that outlives a connection and is resumed on each new one. */
export interface Resumable {
  resume(connection: Connection): Promise<void>;
  notified?(notification: Notification): void;
  /** The connection broke and is being replaced or, with `final`, is not. */
  /** `own` says that the caller closed it. */
  interrupted?(error: GatewayError, final: boolean, own?: boolean): void;
}

export interface LinkOptions {
  /** The gateway's address for messages. */
  readonly address: string;
  readonly url: () => string;
  readonly socket: () => Promise<SocketConstructor>;
  readonly credential: Credential;
  readonly initialize: (token: string | null) => object;
  readonly insist?: boolean | undefined;
  /** How long a request waits for the connection, in milliseconds. */
  readonly patience?: number | undefined;
  readonly heartbeat?: number | undefined;
  readonly backoff?: Backoff | undefined;
}

export interface RequestOptions {
  readonly signal?: AbortSignal | undefined;
  /** Repeat the request on the next connection if this one breaks before the answer. */
  readonly again?: boolean;
  readonly patience?: number;
}

const PATIENCE = 30_000;
const HEARTBEAT = 20_000;
const SILENCE = 10_000;
const DOUBT = 2_000;

// requests that may be repeated
const REPEATABLE = new Set([
  "ping",
  "tools/list",
  "exec/list",
  "exec/wait",
  "exec/resize",
  "exec/cancel",
  "exec/closeStdin",
  "files/stat",
  "files/list",
  "files/read",
  "history/list",
  "history/diff",
]);

export class Link extends Emitter<{ status: LinkStatus }> {
  readonly #options: LinkOptions;
  readonly #resumables = new Set<Resumable>();
  #connection: Connection | null = null;
  readonly #waiting = new Waiters<Connection>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #beat: ReturnType<typeof setTimeout> | undefined;
  readonly #renewal: Renewal;
  #opening = false;
  #retryAfter = 0;
  /** The token of the connection, or of the last attempt at one. */
  #token: string | null = null;
  #wasOpen = false;
  /** Whether another try follows a refused token already. */
  #askedAgain = false;
  #status: LinkStatus = {
    state: "idle",
    attempt: 0,
    retryAt: null,
    error: null,
    expires: null,
    latency: null,
  };
  readonly #browser = new Browser({ back: () => this.#hurry(), offline: () => void this.check(DOUBT) });
  server: ServerInfo | null = null;

  constructor(options: LinkOptions) {
    super();
    this.#options = options;
    this.#renewal = new Renewal(() => this.#renewed(), options.backoff);
  }

  get status(): LinkStatus {
    return this.#status;
  }

  /** Starts connecting, unless that is under way. */
  connect(): void {
    if (this.#status.state === "closed" || this.#opening || this.#connection !== null) return;
    if (this.#status.state === "unauthorized") return; // until `retry`
    if (this.#status.state === "idle") {
      this.#set({ state: "connecting", error: null });
      this.#browser.listen();
    }
    clearTimeout(this.#timer);
    void this.#open();
  }

  /** Ends the connection and everything on it; without an error, as the caller's own wish. Idempotent. */
  close(reason?: GatewayError): void {
    if (this.#status.state === "closed") return;
    const error = reason ?? new Disconnected("this client was closed");
    this.#rest();
    this.#set({ state: "closed", error, retryAt: null, expires: null });
    for (const resumable of [...this.#resumables]) resumable.interrupted?.(error, true, reason === undefined);
    this.#waiting.reject(error);
    const connection = this.#connection;
    this.#connection = null;
    connection?.close(error);
  }

  /** Stops all timers and listeners. */
  #rest(): void {
    this.#browser.rest();
    this.#renewal.stop();
    for (const timer of [this.#timer, this.#beat]) clearTimeout(timer);
  }

  /** Returns the open connection, waiting for it up to `patience` milliseconds. */
  opened(patience = this.#options.patience ?? PATIENCE, signal?: AbortSignal): Promise<Connection> {
    if (this.#connection !== null) return Promise.resolve(this.#connection);
    this.connect();
    if (this.#status.state === "closed" || this.#status.state === "unauthorized") {
      return Promise.reject(this.#status.error ?? new Disconnected("this client was closed"));
    }
    const late = () => this.#status.error ?? new Disconnected("no connection to the gateway");
    return this.#waiting.wait(patience, late, signal);
  }

  /** Calls a method, again on the next connection if it may be repeated. */
  async request<Result>(method: string, params: object = {}, options: RequestOptions = {}): Promise<Result> {
    const again = options.again ?? REPEATABLE.has(method);
    for (;;) {
      const connection = await this.opened(options.patience, options.signal);
      try {
        return await connection.request<Result>(method, params, undefined, options.signal);
      } catch (error) {
        if (!(error instanceof Disconnected) || !again || this.#status.state === "closed") throw error;
      }
    }
  }

  add(resumable: Resumable): void {
    this.#resumables.add(resumable);
  }

  remove(resumable: Resumable): void {
    this.#resumables.delete(resumable);
  }

  async #open(): Promise<void> {
    if (this.#opening) return;
    this.#opening = true;
    let made: Connection | null = null;
    let broken: GatewayError | null = null;
    try {
      const kind = await this.#options.socket();
      this.#token = await this.#options.credential.fresh();
      made = await Connection.open(kind, this.#options.url(), this.#options.initialize(this.#token), {
        notified: (notification) => this.#notified(notification),
        closed: (error) => {
          if (made !== null && this.#connection === made) this.#broke(error);
          else broken = error;
        },
      });
    } catch (error) {
      const failure = error instanceof GatewayError ? error : new Disconnected(String(error));
      const first = failure instanceof Disconnected && !this.#wasOpen;
      const told = first ? await unreachable(this.#options.address, failure.message) : failure;
      this.#opening = false;
      this.#failed(told);
      return;
    }
    this.#opening = false;
    if (this.#status.state === "closed") {
      made.close();
      return;
    }
    if (broken !== null) {
      this.#failed(broken);
      return;
    }
    this.#connection = made;
    this.#retryAfter = 0;
    this.#wasOpen = true;
    this.#askedAgain = false;
    this.server = made.server;
    // resume first, so that these requests are sent before those that waited
    const resumed = [...this.#resumables].map((resumable) => resumable.resume(made).catch(() => {}));
    const expires = made.server.expires ?? null;
    this.#set({ state: "open", attempt: 0, retryAt: null, error: null, expires });
    if (expires !== null && this.#options.credential.renewable) this.#renewal.before(expires);
    this.#waiting.resolve(made);
    this.#schedule();
    await Promise.all(resumed);
  }

  #notified(notification: Notification): void {
    if (notification.method === "server/draining") {
      this.#retryAfter = Number(notification.params.retryAfterMs) || 1000;
      this.#set({ state: "draining" });
    }
    for (const resumable of [...this.#resumables]) resumable.notified?.(notification);
  }

  #broke(error: GatewayError): void {
    this.#connection = null;
    clearTimeout(this.#beat);
    this.#renewal.stop();
    for (const resumable of [...this.#resumables]) resumable.interrupted?.(error, false);
    this.#failed(error);
  }

  #failed(error: GatewayError): void {
    if (this.#status.state === "closed") return;
    const { credential } = this.#options;
    if (error.code === "unauthorized") {
      credential.refused(this.#token);
      // there may be another token by now, or another window may have signed in again
      const again = credential.renewable || (credential.absent && this.#wasOpen);
      if (!again || this.#askedAgain) {
        if (credential.absent && this.#wasOpen) this.#waitForSession();
        else this.close(error);
        return;
      }
      this.#askedAgain = true;
    } else if (!(error instanceof Disconnected) && !error.retriable) {
      this.close(error);
      return;
    } else if (!this.#wasOpen && !this.#options.insist) {
      this.#rest();
      this.#set({ state: "idle", attempt: this.#status.attempt + 1, error });
      this.#waiting.reject(error);
      return;
    }
    const attempt = this.#status.attempt + 1;
    // a gateway that ends has said when the next one is there
    const longest = this.#retryAfter ? this.#retryAfter * 2 : pause(attempt, this.#options.backoff);
    // the second half of the range is random, so that many clients do not reconnect together
    const asked = Number(error.facts.retry_after) * 1000 || 0;
    const delay = Math.max(asked, longest / 2 + (Math.random() * longest) / 2);
    this.#retryAfter = 0;
    const away = this.#browser.isOffline ? "offline" : "reconnecting";
    const state = this.#status.state === "draining" ? "draining" : away;
    this.#set({
      state: attempt > 1 && state === "draining" ? "reconnecting" : state,
      attempt,
      retryAt: Date.now() + delay,
      error,
      expires: null,
    });
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.#open(), delay);
  }

  /** Pauses until the browser has signed in; requests are refused meanwhile. */
  #waitForSession(): void {
    const error = signedOut();
    this.#rest();
    this.#set({ state: "unauthorized", retryAt: null, error, expires: null });
    this.#waiting.reject(error);
  }

  // --- the token's end -----------------------------------------------------------------------------------

  /** Gives the connection a newer token. */
  async renew(token: string, signal?: AbortSignal): Promise<Renewed> {
    const connection = await this.opened(undefined, signal);
    const renewed = await connection.request<Renewed>("session/renew", { token }, undefined, signal);
    if (this.#connection === connection) {
      this.#token = token;
      if (this.server !== null) {
        this.server = { ...this.server, expires: renewed.expires, scopes: renewed.scopes };
      }
      this.#set({ expires: renewed.expires, error: null });
      if (this.#options.credential.renewable) this.#renewal.before(renewed.expires);
    }
    return renewed;
  }

  /** Renews the token of the present connection; see `Renewal`. */
  async #renewed(): Promise<boolean> {
    const { credential } = this.#options;
    const connection = this.#connection;
    let token: string | null = null;
    try {
      token = await credential.renewed(this.#token);
      if (this.#connection === connection) await this.renew(token);
      return true;
    } catch (error) {
      if (connection === null || this.#connection !== connection) return true;
      credential.refused(token);
      this.#set({
        error: error instanceof GatewayError ? error : new GatewayError("unavailable", String(error)),
      });
      return false;
    }
  }

  /** Drops the connection and opens another at once. */
  reconnect(): void {
    this.#connection?.close(new Disconnected("the connection is being replaced"));
    this.#hurry();
  }

  /** Reconnects now, without waiting for the back-off. */
  retry(): void {
    this.#hurry();
  }

  #hurry(): void {
    if (this.#connection !== null) void this.check();
    else if (!this.#opening && this.#status.state !== "closed" && this.#status.state !== "idle") {
      if (this.#status.state === "unauthorized") {
        this.#askedAgain = false;
        this.#browser.listen();
        this.#set({ state: "reconnecting" });
      }
      clearTimeout(this.#timer);
      void this.#open();
    }
  }

  #schedule(): void {
    clearTimeout(this.#beat);
    this.#beat = setTimeout(() => void this.check(), this.#options.heartbeat ?? HEARTBEAT);
  }

  /** Checks whether the gateway answers; a connection without an answer is given up. */
  async check(silence = SILENCE): Promise<void> {
    const connection = this.#connection;
    if (connection === null) return;
    clearTimeout(this.#beat);
    const began = performance.now();
    const timer = setTimeout(
      () => connection.close(new Disconnected("the gateway does not answer")),
      silence,
    );
    try {
      await connection.request("ping");
      this.#set({ latency: performance.now() - began });
      if (this.#connection === connection) this.#schedule();
    } catch {
      // it is reported as a break of the connection
    } finally {
      clearTimeout(timer);
    }
  }

  #set(change: Partial<LinkStatus>): void {
    this.#status = { ...this.#status, ...change };
    this.emit("status", this.#status);
  }
}
