/** One running command: output, input, end, and resumption after a broken connection. */

import type { Connection } from "./connection.js";
import { Emitter } from "./emitter.js";
import { Disconnected, GatewayError } from "./errors.js";
import type { AttachOptions, Encoding } from "./exec-options.js";
import type { Link } from "./link.js";
import { merged, Output, type StreamName } from "./output.js";
import { SentInput } from "./sent-input.js";
import type { Exit, Killed, Offsets, Size } from "./types.js";
import { type Frame, type Notification, STDERR } from "./wire.js";

const MiB = 1 << 20;
/** Read bytes after which they are acknowledged: the gateway sends no more ahead than 8 MiB, whatever our window. */
const ACK = 1 * MiB;

export interface ExecEvents {
  data: { readonly stream: StreamName; readonly data: Uint8Array };
  /** Bytes that were dropped before what comes next. */
  lost: { readonly stream: StreamName; readonly bytes: number };
  /** The connection broke (`false`), or was replaced and the output continues (`true`). */
  attached: boolean;
  exit: Exit;
}

interface Attached {
  readonly channel: number;
  readonly exec?: string;
  readonly pid?: number;
  readonly startedAt?: string;
  readonly from?: Offsets;
  readonly lost?: Offsets;
  readonly attachment?: string;
  /** How many bytes of the input of the attachment that this one resumes have arrived. */
  readonly stdin?: number | undefined;
}

/**
 * A command in a tenant. Read it with `for await` over `stdout`, `stderr` or `output()`, or with the event `data`; its
 * end is `exit`.
 *
 * A broken connection is replaced, and the output continues at the same byte. Unread output is limited to `buffer`,
 * half of it for each stream; at the limit the gateway sends no more, and in time the command itself waits, as for a
 * pipe. Nothing else waits. If nobody reads a stream, its last bytes are kept, at least a quarter of `buffer`, and
 * the command does not wait.
 */
export class Exec extends Emitter<ExecEvents> implements AsyncDisposable {
  id: string;
  pid: number | null = null;
  startedAt: string | null = null;
  readonly stdout: Output;
  readonly stderr: Output;
  /** How it ended, after its last output. Rejects if that can never be known, since this client was closed. */
  readonly exit: Promise<Exit>;
  #link: Link;
  /** The tenant's connection, if `#link` is a separate one for this command. */
  readonly #shared: Link | null;
  /** The most unread bytes of a stream. */
  readonly #most: number;
  readonly #encoding: Encoding;
  /** The bytes of a stream that the gateway sends before some are acknowledged. */
  #window = 0;
  readonly #signal: AbortSignal | undefined;
  readonly #abort: () => Promise<unknown>;
  #start: object | null;
  #settle!: { resolve(exit: Exit): void; reject(error: GatewayError): void };
  #connection: Connection | null = null;
  #channel = 0;
  /** The id of our attachment, so that the next one can resume it. */
  #attachment: string | null = null;
  readonly #sent = new SentInput();
  /** Set once it cannot be known how much of the input arrived. */
  #inputLost = false;
  #state: "starting" | "attached" | "away" | "over" = "starting";

  /** @internal Use `Tenant.exec` and `Tenant.attach`. */
  constructor(
    link: Link,
    id: string,
    start: object | null,
    from: Partial<Offsets>,
    { buffer = 8 * MiB, encoding = "binary", signal }: AttachOptions,
    shared: Link | null = null,
  ) {
    super();
    this.id = id;
    this.#signal = signal;
    this.#abort = start === null ? () => this.detach() : () => this.cancel();
    this.#link = link;
    this.#shared = shared;
    this.#start = start;
    this.#most = Math.max(1, Math.floor(buffer / 2));
    this.#encoding = encoding;
    this.stdout = new Output(() => this.#taken(this.stdout));
    this.stderr = new Output(() => this.#taken(this.stderr));
    this.stdout.offset = from.stdout ?? 0;
    this.stderr.offset = from.stderr ?? 0;
    this.exit = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    this.exit.catch(() => {}); // a caller need not wait for it
  }

  get running(): boolean {
    return this.#state !== "over";
  }

  /** Whether its output arrives at present. */
  get attached(): boolean {
    return this.#state === "attached";
  }

  /** @internal */
  async begin(): Promise<this> {
    let asked = false;
    for (;;) {
      const connection = await this.#link.opened(undefined, this.#signal);
      this.#link.add(this);
      try {
        if (this.#start === null) await this.#attach(connection);
        else if (!asked) {
          asked = true;
          await this.#started(connection, this.#start);
        } else await this.#startOrAttach(connection, this.#start);
        this.#start = null;
        this.#signal?.addEventListener("abort", this.#aborted);
        if (this.#signal?.aborted) this.#aborted();
        return this;
      } catch (error) {
        if (error instanceof Disconnected && this.#link.status.state !== "closed") continue;
        // its start may have gone too far to be given up
        if (this.#signal?.aborted && this.#start !== null) this.#aborted();
        this.#over(error as GatewayError);
        throw error;
      }
    }
  }

  readonly #aborted = (): void => void this.#abort().catch(() => {});

  /** Starts it after a break that lost the answer to the first start: if it runs, its output was kept. */
  async #startOrAttach(connection: Connection, start: object): Promise<void> {
    try {
      await this.#attach(connection);
    } catch (error) {
      if (!(error instanceof GatewayError) || error.code !== "not_found") throw error;
      await this.#started(connection, start);
    }
  }

  async #started(connection: Connection, start: object): Promise<void> {
    const params = { ...start, ...this.#reading() };
    const begun = (result: Attached) => this.#attached(connection, result);
    await connection.request<Attached>("exec/start", params, begun, this.#signal);
  }

  /** Returns the options for the output: unread bytes from before count towards the window. */
  #reading(): object {
    const waiting = Math.max(this.stdout.size, this.stderr.size);
    this.#window = Math.max(1, Math.floor(this.#most / 8), this.#most - waiting);
    return { window: this.#window, encoding: this.#encoding };
  }

  async #attach(connection: Connection): Promise<void> {
    const from = { stdout: this.stdout.offset, stderr: this.stderr.offset };
    const reading = this.#reading();
    const attach = (resume: { resume?: string }) =>
      connection.request<Attached>("exec/attach", { exec: this.id, from, ...resume, ...reading }, (result) =>
        this.#attached(connection, result),
      );
    if (this.#attachment !== null) {
      try {
        await attach({ resume: this.#attachment });
        return;
      } catch (error) {
        // the gateway keeps a limited number of ended ones; without it, it is unknown what input has arrived
        if (!(error instanceof GatewayError) || error.code !== "not_found") throw error;
        this.#attachment = null;
        this.#inputLost ||= this.#sent.any;
        this.#sent.forget();
      }
    }
    await attach({});
  }

  #attached(connection: Connection, result: Attached): void {
    if (this.#state === "over") return;
    this.#connection?.channels.delete(this.#channel);
    this.#connection = connection;
    this.#channel = result.channel;
    this.#state = "attached";
    this.id = result.exec ?? this.id;
    this.pid = result.pid ?? this.pid;
    this.startedAt = result.startedAt ?? this.startedAt;
    for (const name of ["stdout", "stderr"] as const) {
      const output = this[name];
      output.offset = Math.max(output.offset, result.from?.[name] ?? 0);
      output.acked = output.offset;
      const lost = result.lost?.[name] ?? 0;
      if (lost > 0) {
        output.lost += lost;
        this.emit("lost", { stream: name, bytes: lost });
      }
    }
    connection.channels.set(this.#channel, (frame) => this.#frame(frame));
    this.#attachment = result.attachment ?? null;
    if (result.stdin !== undefined) this.#sendAgain(connection, result.stdin);
    this.emit("attached", true);
  }

  /** Sends again what had not arrived when the connection broke, so that the command gets each byte once. */
  #sendAgain(connection: Connection, arrived: number): void {
    const missing = this.#sent.after(arrived);
    if (missing === null) this.#inputLost = true;
    for (const data of missing ?? []) void this.#input(connection, data).catch(() => {});
  }

  async #input(connection: Connection, data: Uint8Array): Promise<void> {
    this.#sent.add(data);
    await connection.input(this.#channel, data);
  }

  // --- what the link brings ------------------------------------------------------------------------------

  /** @internal */
  async resume(connection: Connection): Promise<void> {
    if (this.#state !== "away") return; // `begin` asks for itself
    try {
      await this.#attach(connection);
    } catch (error) {
      if (error instanceof Disconnected) return;
      // it ended with the gateway or the tenant, without a record
      this.#ended({ code: null, signal: null, reason: "lost", durationMs: 0, left: null });
    }
  }

  /** @internal */
  interrupted(error: GatewayError, final: boolean): void {
    if (this.#state === "over") return;
    if (final) {
      this.#over(error);
      return;
    }
    if (this.#state !== "attached") return;
    this.#state = "away";
    this.#connection = null;
    this.emit("attached", false);
  }

  /** @internal */
  notified({ method, params }: Notification): void {
    if (params.exec !== this.id || this.#state === "over") return;
    if (method === "exec/lost") {
      const stream = params.stream === "stderr" ? "stderr" : "stdout";
      const bytes = Number(params.bytes);
      this[stream].lost += bytes;
      this[stream].offset += bytes;
      this.emit("lost", { stream, bytes });
    } else if (method === "exec/detached" && params.channel === this.#channel) {
      this.#over(new GatewayError(String(params.reason), "the newer token does not open this command"));
    } else if (method === "exec/exited" && this.#state === "attached") {
      this.#ended({
        code: params.exitCode as number | null,
        signal: params.signal as string | null,
        reason: params.reason as Exit["reason"],
        durationMs: Number(params.durationMs),
        left: (params.left as number | null | undefined) ?? null,
      });
    }
  }

  #frame(frame: Frame): void {
    const stream = frame.stream === STDERR ? "stderr" : "stdout";
    const output = this[stream];
    output.offset += frame.data.length;
    if (this.listened("data")) {
      this.emit("data", { stream, data: frame.data });
    } else {
      output.push(frame.data);
      if (!output.begun && output.size > this.#most) output.trim(this.#most / 2);
    }
    this.#taken(output);
  }

  /** Lets the gateway send more of a stream once a part of its window was read, or if it is not read. */
  #taken(output: Output): void {
    if (this.#state !== "attached" || this.#connection === null) return;
    if (output.taken - output.acked < Math.min(this.#window / 4, ACK)) return;
    for (const each of [this.stdout, this.stderr]) each.acked = Math.max(each.acked, each.taken);
    const offsets = { stdout: this.stdout.acked, stderr: this.stderr.acked };
    this.#connection.notify("exec/ack", { exec: this.id, ...offsets });
  }

  #ended(exit: Exit): void {
    this.#close(null);
    this.#settle.resolve(exit);
    this.emit("exit", exit);
  }

  #over(error: GatewayError): void {
    this.#close(error);
    this.#settle.reject(error);
  }

  #close(error: GatewayError | null): void {
    this.#state = "over";
    this.#link.remove(this);
    if (this.#shared !== null) {
      this.#link.close();
      this.#link = this.#shared; // to end what it left running
    }
    this.#signal?.removeEventListener("abort", this.#aborted);
    this.#connection?.channels.delete(this.#channel);
    this.stdout.end(error);
    this.stderr.end(error);
  }

  // --- for callers ---------------------------------------------------------------------------------------

  /** Yields the chunks of both streams as they come. Nobody else may read them then. */
  output(): AsyncGenerator<{ stream: StreamName; data: Uint8Array }> {
    return merged(this.stdout, this.stderr);
  }

  /** Waits for its end, after its last output. */
  wait(): Promise<Exit> {
    return this.exit;
  }

  /**
   * Sends bytes or text to its input. What was under way when the connection broke is sent again, once. While it is
   * broken this throws `Disconnected`: input is never kept for later, since the user may see other output by then.
   */
  async write(data: Uint8Array | string): Promise<void> {
    if (this.#connection === null || !this.attached)
      throw new Disconnected("the command is not attached now");
    // a copy: the caller may use its buffer for something else, and we may have to send it again
    const bytes = typeof data === "string" ? new TextEncoder().encode(data) : data.slice();
    await this.#input(this.#connection, bytes);
  }

  /**
   * Its input as a stream, to pipe something into; closing it closes the input. Over a break it waits for the next
   * connection, and fails only if none comes, or if it is not known how much has arrived.
   */
  get stdin(): WritableStream<Uint8Array | string> {
    return new WritableStream({
      write: async (data) => {
        await this.#reattached();
        try {
          await this.write(data);
        } catch (error) {
          if (!(error instanceof Disconnected)) throw error;
          await this.#reattached(); // which has sent it again
        }
      },
      close: async () => {
        await this.#reattached();
        await this.closeStdin();
      },
    });
  }

  /** Waits until there is a connection that has all of the input so far. */
  async #reattached(): Promise<void> {
    while (this.#state === "away" || this.#state === "starting") {
      let stop = () => {};
      const back = new Promise<void>((resolve) => {
        stop = this.on("attached", () => resolve());
      });
      await Promise.race([back, this.exit.catch(() => {})]).finally(stop);
    }
    if (this.#state === "over") throw new Disconnected("the command has ended");
    if (this.#inputLost)
      throw new Disconnected("the connection broke, and how much of the input arrived is not known");
  }

  async closeStdin(): Promise<void> {
    await this.#link.request("exec/closeStdin", { exec: this.id });
  }

  async resize(size: Size): Promise<void> {
    await this.#link.request("exec/resize", { exec: this.id, ...size });
  }

  /** Sends one signal, such as `"INT"`, to the command itself; with `tree`, to all its processes. */
  async signal(signal: string | number, { tree = false } = {}): Promise<void> {
    await this.#link.request("exec/signal", { exec: this.id, signal, ...(tree ? { tree } : {}) });
  }

  /** Ends its whole process tree: TERM, the grace period, KILL. Returns when it is gone. */
  async cancel(graceMs?: number): Promise<Killed> {
    return await this.#link.request("exec/cancel", {
      exec: this.id,
      ...(graceMs === undefined ? {} : { graceMs }),
    });
  }

  /** Leaves it running for its linger time; `Tenant.attach` reads it again by its id. */
  async detach(): Promise<void> {
    if (this.#state === "over") return;
    const connection = this.#connection;
    this.#over(new Disconnected("detached from this command"));
    if (connection?.alive) await connection.request("exec/detach", { exec: this.id });
  }

  /** For `await using`: ends it with its process tree, unless it has ended or was detached. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.running) await this.cancel();
  }
}
