/** One tenant: its tools, files, commands and events over one connection that heals itself. */

import { GatewayError } from "./errors.js";
import { type AttachOptions, Exec, type ExecOptions } from "./exec.js";
import { TenantEvents, Watch } from "./feed.js";
import { Files } from "./files.js";
import { History } from "./history.js";
import type { HttpClient } from "./http.js";
import { Life, type Place } from "./life.js";
import { Link, type LinkOptions, type LinkStatus, type RequestOptions } from "./link.js";
import { type ToolOptions, ToolResult } from "./tools.js";
import type { ExecInfo, Offsets, Renewed, RunResult, ServerInfo, ToolInfo } from "./types.js";
import { unique } from "./unique.js";

export interface TenantOptions {
  /** Names the tool session, which then outlives a broken connection: what was read, where Bash stands. */
  readonly session?: string | undefined;
  readonly readBeforeWrite?: boolean | undefined;
  /** `ToolOptions.lingerMs` of every call that has none of its own. */
  readonly lingerMs?: number | undefined;
  readonly patience?: number | undefined;
  readonly heartbeat?: number | undefined;
  readonly backoff?: LinkOptions["backoff"] | undefined;
  /** Go on trying where the first connection fails, rather than say so at once. */
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
  readonly lastEventId?: number | undefined;
  /** Ends it, as `close` does. */
  readonly signal?: AbortSignal | undefined;
}

/**
 * Connects when something is asked. All of it shares one connection, but for a second reader of one command; see `Exec`
 * for what that means.
 */
export class Tenant extends Life<Tenant> implements Disposable {
  readonly files: Files;
  readonly history: History;
  readonly #link: Link;
  /** Makes another connection like it. */
  readonly #another: () => Link;
  /** The commands that are read over `#link`, and those that have a connection of their own. */
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
  async renew(token: string): Promise<Renewed> {
    const [renewed] = await Promise.all([this.#link, ...this.#apart].map((link) => link.renew(token)));
    return renewed as Renewed;
  }

  /** Drops the connection and makes another, on which everything goes on. */
  reconnect(): void {
    for (const link of [this.#link, ...this.#apart]) link.reconnect();
  }

  close(): void {
    for (const link of [this.#link, ...this.#apart]) link.close();
  }

  /** @internal The same tenant over a connection of its own. */
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
   * Calls a tool. A failure in the tool's own terms is a result with `isError`. Where the connection breaks
   * before the answer it is asked again by its `callId`, and joins the call that still runs.
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

  /** Begins to read a command. A connection has one reader of each, so that a second one gets a connection of its own. */
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

  /** Returns the tenant's commands, those that ended a while ago included. */
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

  // --- what happens ----------------------------------------------------------------------------------------

  /**
   * Watches files and folders, these with all below. After a broken connection, and where the gateway missed
   * something, comes a change with `overflow`: read anew what you show.
   */
  async watch(paths: readonly string[] = ["."], options: WatchOptions = {}): Promise<Watch> {
    const { signal, ...rest } = options;
    return await new Watch(this.#link, { paths, ...rest }).begin(signal);
  }

  /**
   * Follows the events of this tenant; after a broken connection it goes on where it stopped. Once at a time:
   * the gateway does not say to which subscription of a connection an event belongs.
   */
  async events(options: TenantEventOptions = {}): Promise<TenantEvents> {
    if (this.#events?.open) {
      throw new GatewayError(
        "conflict",
        "the events are followed already; a second `gateway.tenant` can too",
      );
    }
    const { signal, ...filter } = options;
    this.#events = new TenantEvents(this.#link, filter);
    return await this.#events.begin(signal);
  }
}

function what(command: string | readonly string[]): object {
  return typeof command === "string" ? { command } : { argv: command };
}
