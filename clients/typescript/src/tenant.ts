/** One tenant: its tools, files, commands and events over one connection that heals itself. */

import type { Connection } from "./connection.js";
import { Disconnected, GatewayError } from "./errors.js";
import { type AttachOptions, Exec, type ExecOptions } from "./exec.js";
import { Files } from "./files.js";
import type { HttpClient } from "./http.js";
import { Link, type LinkOptions, type LinkStatus, type RequestOptions, type Resumable } from "./link.js";
import type {
  ExecInfo,
  FileChanges,
  GatewayEvent,
  Offsets,
  Renewed,
  ServerInfo,
  SiteAnswer,
  TenantInfo,
  ToolResult,
  Usage,
} from "./types.js";
import { unique } from "./unique.js";
import type { Notification } from "./wire.js";

export interface TenantOptions {
  /** Names the tool session, which then outlives a broken connection: what was read, where Bash stands. */
  readonly session?: string;
  readonly readBeforeWrite?: boolean;
  readonly patience?: number;
  readonly heartbeat?: number;
  readonly backoff?: LinkOptions["backoff"];
  /** Go on trying where the first connection fails, rather than say so at once. */
  readonly insist?: boolean;
}

export interface ToolOptions {
  /** The same id and input again returns the recorded result. One is made up where left out. */
  readonly callId?: string;
  /** For how long the call goes on where the connection broke, so that it can be joined again; 30 s by default. */
  readonly lingerMs?: number;
  readonly signal?: AbortSignal;
}

export interface Logs {
  readonly lines?: number;
  readonly signal?: AbortSignal;
}

/** Connects when something is asked. All of it shares one connection; see `Exec` for what that means. */
export class Tenant implements Disposable {
  readonly name: string;
  readonly files: Files;
  readonly #http: HttpClient;
  readonly #link: Link;
  #events: TenantEvents | null = null;

  /** @internal Use `Gateway.tenant`. */
  constructor(
    http: HttpClient,
    name: string,
    client: { readonly name: string; readonly version: string },
    options: TenantOptions,
    link: Pick<LinkOptions, "address" | "url" | "socket">,
  ) {
    this.name = name;
    this.#http = http;
    this.#link = new Link({
      ...link,
      ...options,
      credential: http.credential,
      initialize: (token) => ({
        client,
        ...(options.session === undefined ? {} : { session: options.session }),
        ...(options.readBeforeWrite === undefined ? {} : { readBeforeWrite: options.readBeforeWrite }),
        ...(token === null ? {} : { token }),
      }),
    });
    this.files = new Files(this.#link);
  }

  // --- the connection ------------------------------------------------------------------------------------

  get status(): LinkStatus {
    return this.#link.status;
  }

  /** Calls `listener` whenever the state of the connection changes; returns what stops that. */
  onStatus(listener: (status: LinkStatus) => void): () => void {
    return this.#link.on("status", listener);
  }

  /** Connects now, and returns what the gateway says of itself. */
  async connect(): Promise<ServerInfo> {
    return (await this.#link.opened()).server;
  }

  /** Asks at once whether the gateway is there, rather than at the next heartbeat. */
  check(): Promise<void> {
    return this.#link.check();
  }

  /** Tries at once to connect again, rather than when the back-off says. */
  retry(): void {
    this.#link.retry();
  }

  /**
   * Has a newer token of the same subject take the place of the present one on the open connection, without a break.
   * Throws where the gateway refuses it: the connection then goes on with the old one.
   */
  renew(token: string): Promise<Renewed> {
    return this.#link.renew(token);
  }

  /** Drops the connection and makes another, on which everything goes on. */
  reconnect(): void {
    this.#link.reconnect();
  }

  close(): void {
    this.#link.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** Calls any method of `gateway.v1`. */
  request<Result>(method: string, params?: object, options?: RequestOptions): Promise<Result> {
    return this.#link.request(method, params, options);
  }

  // --- tools ---------------------------------------------------------------------------------------------

  /**
   * Calls a tool. A failure in the tool's own terms is a result with `isError`. Where the connection breaks
   * before the answer it is asked again by its `callId`, and joins the call that still runs.
   */
  tool(name: string, args: object, options: ToolOptions = {}): Promise<ToolResult> {
    const callId = options.callId ?? unique();
    return this.#link.request(
      "tools/call",
      { name, arguments: args, callId, lingerMs: options.lingerMs },
      { again: true, signal: options.signal },
    );
  }

  // --- commands ------------------------------------------------------------------------------------------

  /** Starts a command: a line for bash, or a list of program and arguments. */
  exec(command: string | readonly string[], options: ExecOptions = {}): Promise<Exec> {
    const { buffer, encoding, execId = unique(), ...rest } = options;
    const what = typeof command === "string" ? { command } : { argv: command };
    return new Exec(this.#link, execId, { ...what, ...rest, execId }, {}, { buffer, encoding }).begin();
  }

  /** Attaches to a command by its id: its output from these byte offsets on, then live. */
  attach(execId: string, from: Partial<Offsets> = {}, options: AttachOptions = {}): Promise<Exec> {
    return new Exec(this.#link, execId, null, from, options).begin();
  }

  async execs(): Promise<readonly ExecInfo[]> {
    return (await this.#link.request<{ execs: ExecInfo[] }>("exec/list")).execs;
  }

  // --- what happens ----------------------------------------------------------------------------------------

  /**
   * Watches files and folders, these with all below. After a broken connection, and where the gateway missed
   * something, comes a change with `overflow`: read anew what you show.
   */
  async watch(paths: readonly string[], options: { ignore?: readonly string[] } = {}): Promise<Watch> {
    return await new Watch(this.#link, { paths, ...options }).begin();
  }

  /**
   * Follows the events of this tenant; after a broken connection it goes on where it stopped. Once at a time:
   * the gateway does not say to which subscription of a connection an event belongs.
   */
  async events(options: { types?: readonly string[]; lastEventId?: number } = {}): Promise<TenantEvents> {
    if (this.#events?.open) {
      throw new GatewayError(
        "conflict",
        "the events are followed already; a second `gateway.tenant` can too",
      );
    }
    this.#events = new TenantEvents(this.#link, options);
    return await this.#events.begin();
  }

  // --- over HTTP -------------------------------------------------------------------------------------------

  info(): Promise<TenantInfo> {
    return this.#http.json("GET", this.#path(""));
  }

  metrics(signal?: AbortSignal): Promise<Usage> {
    return this.#http.json("GET", this.#path("/metrics"), undefined, { signal });
  }

  /** Asks whether the tenant's site answers now; `answers` is null where it has none or is asleep. */
  site(signal?: AbortSignal): Promise<SiteAnswer> {
    return this.#http.json("GET", this.#path("/site"), undefined, { signal });
  }

  start(): Promise<TenantInfo> {
    return this.#http.json("POST", this.#path("/start"));
  }

  stop(): Promise<TenantInfo> {
    return this.#http.json("POST", this.#path("/stop"));
  }

  restart(): Promise<TenantInfo> {
    return this.#http.json("POST", this.#path("/restart"));
  }

  /** Yields the lines of the site's journal, the last `lines` first; ends when it does not follow. */
  async *logs(options: Logs & { follow?: boolean } = {}): AsyncGenerator<string> {
    const query = new URLSearchParams({
      lines: String(options.lines ?? 200),
      follow: options.follow ? "1" : "0",
    });
    const response = await this.#http.http("GET", this.#path(`/logs?${query}`), {
      signal: options.signal,
    });
    yield* lines(response);
  }

  #path(rest: string): string {
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

/** How many undelivered values a feed keeps before it says that some were missed. */
const FEED = 10_000;

/** Something that the gateway tells again and again, as an async iterable; `close` ends it. */
abstract class Feed<Value> implements Resumable, AsyncIterable<Value> {
  readonly #ready: Value[] = [];
  #wake: (() => void) | null = null;
  #error: GatewayError | null = null;
  #done = false;

  constructor(
    protected readonly link: Link,
    protected readonly params: object,
  ) {}

  protected abstract readonly verbs: { begin: string; end: string; told: string };
  protected abstract key(result: Record<string, unknown>): number;
  protected abstract told(params: Readonly<Record<string, unknown>>): boolean;
  protected number: number | null = null;

  /** @internal */
  async begin(): Promise<this> {
    for (;;) {
      const connection = await this.link.opened();
      try {
        await this.ask(connection);
        this.link.add(this);
        return this;
      } catch (error) {
        if (!(error instanceof Disconnected) || this.link.status.state === "closed") throw error;
      }
    }
  }

  protected async ask(connection: Connection): Promise<void> {
    await connection.request<Record<string, unknown>>(this.verbs.begin, this.params, (result) => {
      this.number = this.key(result);
    });
  }

  /** @internal */
  async resume(connection: Connection): Promise<void> {
    try {
      await this.ask(connection);
    } catch (error) {
      if (error instanceof GatewayError && !(error instanceof Disconnected)) this.end(error);
    }
  }

  /** @internal */
  interrupted(error: GatewayError, final: boolean): void {
    this.number = null;
    if (final) this.end(error);
  }

  /** @internal */
  notified({ method, params }: Notification): void {
    if (method === this.verbs.told) this.told(params);
  }

  protected push(value: Value): boolean {
    if (this.#ready.length >= FEED) return false;
    this.#ready.push(value);
    this.#wake?.();
    return true;
  }

  protected clear(): void {
    this.#ready.length = 0;
  }

  protected end(error: GatewayError | null): void {
    if (this.#done) return;
    this.#done = true;
    this.#error = error;
    this.link.remove(this);
    this.#wake?.();
  }

  get open(): boolean {
    return !this.#done;
  }

  /** Ends it here and in the gateway. Idempotent. */
  close(): void {
    if (this.#done) return;
    const [name, number] = [this.verbs.end === "files/unwatch" ? "watch" : "subscription", this.number];
    this.end(null);
    if (number !== null) {
      void this.link.request(this.verbs.end, { [name]: number }, { patience: 0 }).catch(() => {});
    }
  }

  async *[Symbol.asyncIterator](): AsyncIterator<Value> {
    try {
      for (;;) {
        const value = this.#ready.shift();
        if (value !== undefined) {
          yield value;
          continue;
        }
        if (this.#done) {
          if (this.#error !== null) throw this.#error;
          return;
        }
        await new Promise<void>((resolve) => {
          this.#wake = resolve;
        });
      }
    } finally {
      this.close();
    }
  }
}

export class Watch extends Feed<FileChanges> {
  protected override readonly verbs = { begin: "files/watch", end: "files/unwatch", told: "files/changed" };

  protected override key(result: Record<string, unknown>): number {
    return Number(result.watch);
  }

  /** @internal */
  override async resume(connection: Connection): Promise<void> {
    await super.resume(connection);
    this.push({ changes: [], overflow: true });
  }

  protected override told(params: Readonly<Record<string, unknown>>): boolean {
    if (params.watch !== this.number) return false;
    const changes = params as unknown as FileChanges;
    if (!this.push(changes)) {
      this.clear();
      this.push({ changes: [], overflow: true });
    }
    // the tenant or its folder is another now: watch that
    if (changes.ended !== undefined) void this.#again();
    return true;
  }

  async #again(): Promise<void> {
    this.number = null;
    for (
      let wait = 250;
      this.link.status.state === "open" && this.number === null;
      wait = Math.min(wait * 2, 8000)
    ) {
      await new Promise((resolve) => setTimeout(resolve, wait));
      try {
        await this.ask(await this.link.opened(0));
        this.push({ changes: [], overflow: true });
      } catch (error) {
        if (error instanceof GatewayError && ["not_found", "forbidden"].includes(error.code))
          return this.end(error);
      }
    }
  }
}

export class TenantEvents extends Feed<GatewayEvent> {
  protected override readonly verbs = {
    begin: "events/subscribe",
    end: "events/unsubscribe",
    told: "event",
  };
  #last: number | null = null;

  protected override key(result: Record<string, unknown>): number {
    if (this.#last === null) this.#last = Number(result.lastEventId);
    return Number(result.subscription);
  }

  protected override async ask(connection: Connection): Promise<void> {
    const params = this.#last === null ? this.params : { ...this.params, lastEventId: this.#last };
    await connection.request<Record<string, unknown>>(this.verbs.begin, params, (result) => {
      this.number = this.key(result);
    });
  }

  /** @internal */
  override notified(notification: Notification): void {
    const { method, params } = notification;
    if (method === "events/ended" && params.subscription === this.number) {
      this.end(new GatewayError(String(params.reason), "the newer token does not open the events"));
    } else super.notified(notification);
  }

  protected override told(params: Readonly<Record<string, unknown>>): boolean {
    const event = params as unknown as GatewayEvent;
    if (typeof event.type !== "string") return false;
    const id = Number(event.id);
    if (this.#last !== null && id <= this.#last && event.type !== "gap") return false;
    this.#last = id;
    if (!this.push(event)) {
      this.clear();
      this.push({ ...event, type: "gap", data: { oldest: id + 1 } });
    }
    return true;
  }
}
