/** One tenant: its tools, files, commands and events over one connection, which is replaced when it breaks. */

import { GatewayError } from "./errors.js";
import { Exec } from "./exec.js";
import type { AttachOptions, ExecOptions } from "./exec-options.js";
import { TenantEvents, Watch } from "./feed.js";
import { Files } from "./files.js";
import { History } from "./history.js";
import type { HttpClient } from "./http.js";
import { Lifecycle, type Place } from "./lifecycle.js";
import { Link, type LinkOptions, type LinkStatus, type RequestOptions } from "./link.js";
import { type ToolOptions, ToolResult } from "./tools.js";
import type { ExecInfo, Offsets, Renewed, RunResult, ServerInfo, ToolInfo } from "./types.js";
import { unique } from "./unique.js";

export interface TenantOptions {
  /** Names the tool session, which then outlives a broken connection: the files read, and Bash's folder. */
  readonly session?: string | undefined;
  readonly readBeforeWrite?: boolean | undefined;
  /** The default of `ToolOptions.lingerMs`. */
  readonly lingerMs?: number | undefined;
  readonly patience?: number | undefined;
  readonly heartbeat?: number | undefined;
  readonly backoff?: LinkOptions["backoff"] | undefined;
  /** Keep trying if the first connection fails, instead of throwing at once. */
  readonly insist?: boolean | undefined;
}

export interface RunOptions {
  readonly cwd?: string | undefined;
  readonly env?: Readonly<Record<string, string>> | undefined;
  /** All of its input. */
  readonly stdin?: string | undefined;
  readonly timeoutMs?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

export interface WatchOptions {
  readonly ignore?: readonly string[] | undefined;
  /** Ends it, as `close` does. */
  readonly signal?: AbortSignal | undefined;
}

export interface TenantEventOptions {
  /** May end in `*`. */
  readonly types?: readonly string[] | undefined;
  /** An event's, or where an earlier feed stood: its `position`. */
  readonly lastEventId?: string | number | undefined;
  /** Ends it, as `close` does. */
  readonly signal?: AbortSignal | undefined;
}

/**
 * Connects on the first request. Everything shares one connection, except a second reader of a command; `Exec` says
 * what that means.
 */
export class Tenant extends Lifecycle<Tenant> implements Disposable {
  readonly files: Files;
  readonly history: History;
  /** @internal Whether the tool session has a name, so that it outlives this client. */
  readonly named: boolean;
  readonly #link: Link;
  /** Opens another connection like it. */
  readonly #another: () => Link;
  /** The commands that are read over `#link`, and those with a separate connection. */
  readonly #read = new Set<string>();
  readonly #apart = new Set<Link>();
  readonly #lingerMs: number | undefined;
  #events: TenantEvents | null = null;

  /** @internal Use `Gateway.tenant`. */
  constructor(
    http: HttpClient,
    name: string,
    client: { readonly name: string; readonly version: string },
    options: TenantOptions,
    place: Place<Tenant>,
  ) {
    super(http, name, place);
    this.#lingerMs = options.lingerMs;
    this.named = options.session !== undefined;
    this.#another = () =>
      new Link({
        address: place.address,
        url: place.url,
        socket: place.socket,
        ...options,
        credential: http.credential,
        initialize: (token) => ({
          client,
          ...(options.session === undefined ? {} : { session: options.session }),
          ...(options.readBeforeWrite === undefined ? {} : { readBeforeWrite: options.readBeforeWrite }),
          ...(token === null ? {} : { token }),
        }),
      });
    this.#link = this.#another();
    this.files = new Files(this.#link, http, name);
    this.history = new History(this.#link);
  }

  // --- the connection ------------------------------------------------------------------------------------

  get status(): LinkStatus {
    return this.#link.status;
  }

  /** Calls `listener` whenever the connection's state changes; returns a function that stops it. */
  onStatus(listener: (status: LinkStatus) => void): () => void {
    return this.#link.on("status", listener);
  }

  /** Connects now, and returns the gateway's answer to `initialize`. */
  async connect(signal?: AbortSignal): Promise<ServerInfo> {
    return (await this.#link.opened(undefined, signal)).server;
  }

  /** Checks now whether the gateway answers, without waiting for the next heartbeat. */
  check(): Promise<void> {
    return this.#link.check();
  }

  /** Reconnects now, without waiting for the back-off. */
  retry(): void {
    this.#link.retry();
  }

  /**
   * Replaces the open connection's token by a newer one of the same subject, without a break. Throws if the gateway
   * refuses it; the connection then keeps the old one.
   */
  async renew(token: string, signal?: AbortSignal): Promise<Renewed> {
    const links = [this.#link, ...this.#apart];
    const [renewed] = await Promise.all(links.map((link) => link.renew(token, signal)));
    return renewed as Renewed;
  }

  /** Drops the connection and opens another, on which everything continues. */
  reconnect(): void {
    for (const link of [this.#link, ...this.#apart]) link.reconnect();
  }

  close(): void {
    for (const link of [this.#link, ...this.#apart]) link.close();
  }

  /** @internal The same tenant over a separate connection. */
  twin(): Tenant {
    return this.place.other(this.name);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  async ping(signal?: AbortSignal): Promise<void> {
    await this.#link.request("ping", {}, { signal });
  }

  /** Calls any method of `gateway.v1`. */
  request<Result>(method: string, params?: object, options?: RequestOptions): Promise<Result> {
    return this.#link.request(method, params, options);
  }

  // --- tools ---------------------------------------------------------------------------------------------

  /**
   * Calls a tool. A failure of the tool itself is a result with `isError`. If the connection breaks before the answer,
   * the request is repeated with its `callId`, and joins the call that still runs.
   */
  async tool(name: string, args: object, options: ToolOptions = {}): Promise<ToolResult> {
    const { callId = unique(), lingerMs = this.#lingerMs, signal } = options;
    const params = { name, arguments: args, callId, lingerMs };
    return ToolResult.of(await this.#link.request("tools/call", params, { again: true, signal }));
  }

  /** Returns name, description and input schema of every tool. */
  async tools(signal?: AbortSignal): Promise<readonly ToolInfo[]> {
    return (await this.#link.request<{ tools: ToolInfo[] }>("tools/list", {}, { signal })).tools;
  }

  // --- commands ------------------------------------------------------------------------------------------

  /** Starts a command: a line for bash, or a list of program and arguments. Aborting `signal` ends its whole tree. */
  exec(command: string | readonly string[], options: ExecOptions = {}): Promise<Exec> {
    const { buffer, encoding, signal, execId = unique(), ...rest } = options;
    const start = { ...what(command), ...rest, execId };
    return this.#reading(execId, start, {}, { buffer, encoding, signal });
  }

  /** Attaches to a command by its id: its output from these byte offsets on, then live. Aborting `signal` detaches. */
  attach(execId: string, from: Partial<Offsets> = {}, options: AttachOptions = {}): Promise<Exec> {
    return this.#reading(execId, null, from, options);
  }

  /** Begins to read a command. A connection has one reader of each, so a second one gets a separate connection. */
  #reading(id: string, start: object | null, from: Partial<Offsets>, options: AttachOptions): Promise<Exec> {
    const apart = this.#read.has(id);
    const link = apart ? this.#another() : this.#link;
    const exec = new Exec(link, id, start, from, options, apart ? this.#link : null);
    if (apart) this.#apart.add(link);
    else this.#read.add(id);
    const over = () => (apart ? this.#apart.delete(link) : this.#read.delete(id));
    exec.exit.then(over, over);
    return exec.begin();
  }

  /** Returns the tenant's commands, including recently ended ones. */
  async execs(signal?: AbortSignal): Promise<readonly ExecInfo[]> {
    return (await this.#link.request<{ execs: ExecInfo[] }>("exec/list", {}, { signal })).execs;
  }

  /** Runs a command over HTTP and waits for it. Aborting `signal` ends it with its tree. */
  async run(command: string | readonly string[], options: RunOptions = {}): Promise<RunResult> {
    const { timeoutMs: timeout_ms, signal, ...rest } = options;
    const body = { ...what(command), ...rest, timeout_ms };
    const answer = await this.http.json<Record<string, unknown>>("POST", this.path("/exec"), body, {
      signal,
    });
    const { exit_code: exitCode, duration_ms: durationMs, ...same } = answer;
    return { ...same, exitCode, durationMs } as unknown as RunResult;
  }

  // --- watches and events ----------------------------------------------------------------------------------

  /**
   * Watches files, and folders with all below them. After a broken connection, or if the gateway missed something, a
   * change with `overflow` comes: read again what you show.
   */
  async watch(paths: readonly string[] = ["."], options: WatchOptions = {}): Promise<Watch> {
    const { signal, ...rest } = options;
    return await new Watch(this.#link, { paths, ...rest }).begin(signal);
  }

  /**
   * Follows the events of this tenant; after a broken connection it continues where it stopped. Only one at a time, since
   * the gateway does not say to which subscription of a connection an event belongs.
   */
  async events(options: TenantEventOptions = {}): Promise<TenantEvents> {
    if (this.#events?.open) {
      throw new GatewayError(
        "conflict",
        "the events are followed already; use a second `gateway.tenant` for this",
      );
    }
    const { signal, ...filter } = options;
    this.#events = new TenantEvents(this.#link, filter);
    try {
      return await this.#events.begin(signal);
    } catch (error) {
      this.#events = null;
      throw error;
    }
  }
}

function what(command: string | readonly string[]): object {
  return typeof command === "string" ? { command } : { argv: command };
}
