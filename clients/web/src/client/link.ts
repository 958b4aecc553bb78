/** Knows how to stay connected to one tenant: back-off, what is asked again, and what the state is. */

import { Connection, type SocketConstructor } from "./connection.js";
import { Emitter } from "./emitter.js";
import { cancelled, Disconnected, GatewayError } from "./errors.js";
import type { ServerInfo } from "./types.js";
import type { Notification } from "./wire.js";

/**
 * `idle` before anything was asked; `connecting` for the first time; `open`; `reconnecting` after a break;
 * `offline` is that where the browser says that there is no network; `draining` when the gateway is ending;
 * `closed` for ever, by us or by a refusal that asking again would not change.
 */
export type LinkState = "idle" | "connecting" | "open" | "reconnecting" | "offline" | "draining" | "closed";

export interface LinkStatus {
  readonly state: LinkState;
  /** How many attempts failed since the connection was last open. */
  readonly attempt: number;
  /** When the next attempt is made, in milliseconds since the epoch. */
  readonly retryAt: number | null;
  readonly error: GatewayError | null;
  /** The round trip of the last heartbeat, in milliseconds. */
  readonly latency: number | null;
}

/** What lives longer than a connection and is brought to each new one. */
export interface Resumable {
  resume(connection: Connection): Promise<void>;
  notified?(notification: Notification): void;
  /** The connection broke and another is being made; or, with `final`, none will be. */
  interrupted?(error: GatewayError, final: boolean): void;
}

export interface LinkOptions {
  readonly url: () => string;
  readonly socket: () => Promise<SocketConstructor>;
  readonly initialize: () => object;
  /** How long a request waits for the connection, in milliseconds. */
  readonly patience?: number | undefined;
  readonly heartbeat?: number | undefined;
  readonly backoff?: { readonly first: number; readonly most: number } | undefined;
}

export interface RequestOptions {
  readonly signal?: AbortSignal | undefined;
  /** Ask again on the next connection where this one breaks before the answer. */
  readonly again?: boolean;
  readonly patience?: number;
}

const PATIENCE = 30_000;
const HEARTBEAT = 20_000;
const SILENCE = 10_000;
const DOUBT = 2_000;

// asking these twice does the same as asking once
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
]);

export class Link extends Emitter<{ status: LinkStatus }> {
  readonly #options: LinkOptions;
  readonly #resumables = new Set<Resumable>();
  #connection: Connection | null = null;
  #waiting = new Set<{ resolve(connection: Connection): void; reject(error: GatewayError): void }>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #beat: ReturnType<typeof setTimeout> | undefined;
  #opening = false;
  #retryAfter = 0;
  #status: LinkStatus = { state: "idle", attempt: 0, retryAt: null, error: null, latency: null };
  readonly #environment = typeof window === "undefined" ? null : window;
  server: ServerInfo | null = null;

  constructor(options: LinkOptions) {
    super();
    this.#options = options;
  }

  get status(): LinkStatus {
    return this.#status;
  }

  /** Starts connecting where that is not under way. */
  connect(): void {
    if (this.#status.state === "closed" || this.#opening || this.#connection !== null) return;
    if (this.#status.state === "idle") {
      this.#set({ state: "connecting" });
      this.#environment?.addEventListener("online", this.#hurry);
      this.#environment?.addEventListener("offline", this.#doubt);
      this.#environment?.document.addEventListener("visibilitychange", this.#look);
    }
    clearTimeout(this.#timer);
    void this.#open();
  }

  /** Ends the connection and everything on it. Idempotent. */
  close(error: GatewayError = new Disconnected("this client was closed")): void {
    if (this.#status.state === "closed") return;
    this.#environment?.removeEventListener("online", this.#hurry);
    this.#environment?.removeEventListener("offline", this.#doubt);
    this.#environment?.document.removeEventListener("visibilitychange", this.#look);
    clearTimeout(this.#timer);
    clearTimeout(this.#beat);
    this.#set({ state: "closed", error, retryAt: null });
    for (const resumable of [...this.#resumables]) resumable.interrupted?.(error, true);
    for (const waiter of this.#waiting) waiter.reject(error);
    this.#waiting.clear();
    const connection = this.#connection;
    this.#connection = null;
    connection?.close(error);
  }

  /** Returns the open connection, waiting for it up to `patience` milliseconds. */
  opened(patience = this.#options.patience ?? PATIENCE, signal?: AbortSignal): Promise<Connection> {
    if (this.#connection !== null) return Promise.resolve(this.#connection);
    this.connect();
    if (this.#status.state === "closed") {
      return Promise.reject(this.#status.error ?? new Disconnected("this client was closed"));
    }
    if (signal?.aborted) return Promise.reject(cancelled());
    return new Promise((resolve, reject) => {
      const end = () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", abort);
        this.#waiting.delete(waiter);
      };
      const waiter = {
        resolve: (connection: Connection) => {
          end();
          resolve(connection);
        },
        reject: (error: GatewayError) => {
          end();
          reject(error);
        },
      };
      const abort = () => waiter.reject(cancelled());
      const timer = setTimeout(() => {
        waiter.reject(this.#status.error ?? new Disconnected("no connection to the gateway"));
      }, patience);
      signal?.addEventListener("abort", abort);
      this.#waiting.add(waiter);
    });
  }

  /** Calls a method, on the next connection too where it may be asked again. */
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
      made = await Connection.open(kind, this.#options.url(), this.#options.initialize(), {
        notified: (notification) => this.#notified(notification),
        closed: (error) => {
          if (made !== null && this.#connection === made) this.#broke(error);
          else broken = error;
        },
      });
    } catch (error) {
      this.#opening = false;
      this.#failed(error instanceof GatewayError ? error : new Disconnected(String(error)));
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
    this.server = made.server;
    // what was there before comes first: its requests are sent before those that waited
    const resumed = [...this.#resumables].map((resumable) => resumable.resume(made).catch(() => {}));
    this.#set({ state: "open", attempt: 0, retryAt: null, error: null });
    for (const waiter of [...this.#waiting]) waiter.resolve(made);
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
    for (const resumable of [...this.#resumables]) resumable.interrupted?.(error, false);
    this.#failed(error);
  }

  #failed(error: GatewayError): void {
    if (this.#status.state === "closed") return;
    if (!(error instanceof Disconnected) && !error.retriable) {
      this.close(error);
      return;
    }
    const { first = 250, most = 8000 } = this.#options.backoff ?? {};
    const attempt = this.#status.attempt + 1;
    const backoff = Math.min(most, first * 2 ** Math.min(attempt - 1, 16));
    // full second half of the range at random, so that many clients do not come back as one
    const delay = Math.max(this.#retryAfter, backoff / 2 + (Math.random() * backoff) / 2);
    this.#retryAfter = 0;
    const unplugged = this.#environment?.navigator.onLine === false;
    const state = this.#status.state === "draining" ? "draining" : unplugged ? "offline" : "reconnecting";
    this.#set({
      state: attempt > 1 && state === "draining" ? "reconnecting" : state,
      attempt,
      retryAt: Date.now() + delay,
      error,
    });
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.#open(), delay);
  }

  /** Tries at once what would be tried later. */
  retry(): void {
    this.#hurry();
  }

  readonly #hurry = (): void => {
    if (this.#connection !== null) void this.check();
    else if (!this.#opening && this.#status.state !== "closed" && this.#status.state !== "idle") {
      clearTimeout(this.#timer);
      void this.#open();
    }
  };

  /** The browser says that there is no network, but a gateway on this very device may be reached without. */
  readonly #doubt = (): void => void this.check(DOUBT);

  readonly #look = (): void => {
    if (this.#environment?.document.visibilityState === "visible") this.#hurry();
  };

  #schedule(): void {
    clearTimeout(this.#beat);
    this.#beat = setTimeout(() => void this.check(), this.#options.heartbeat ?? HEARTBEAT);
  }

  /** Asks whether the other end is there; a connection that does not answer is given up. */
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
      // it is told to us as a break of the connection
    } finally {
      clearTimeout(timer);
    }
  }

  #set(change: Partial<LinkStatus>): void {
    this.#status = { ...this.#status, ...change };
    this.emit("status", this.#status);
  }
}
