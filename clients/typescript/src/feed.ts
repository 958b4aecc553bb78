/** Watches and events of a tenant, as async iterables that outlive a connection. */

import type { Connection } from "./connection.js";
import { cancelled, Disconnected, GatewayError } from "./errors.js";
import type { Link } from "./link.js";
import type { FileChanges, GatewayEvent } from "./types.js";
import type { Notification } from "./wire.js";

/** How many undelivered values a feed keeps before it drops some and says so. */
const FEED = 10_000;

/** A subscription as an async iterable; `close` ends it. */
abstract class Feed<Value> implements AsyncIterable<Value> {
  readonly #ready: Value[] = [];
  #wake: (() => void) | null = null;
  #error: GatewayError | null = null;
  #done = false;
  #unbind = (): void => {};

  constructor(
    protected readonly link: Link,
    protected readonly params: object,
  ) {}

  protected abstract readonly verbs: { begin: string; end: string; told: string };
  protected abstract key(result: Record<string, unknown>): number;
  protected abstract told(params: Readonly<Record<string, unknown>>): boolean;
  protected number: number | null = null;

  /** @internal Aborting `signal` closes it, then or later. */
  async begin(signal?: AbortSignal): Promise<this> {
    for (;;) {
      const connection = await this.link.opened(undefined, signal);
      try {
        await this.ask(connection);
        this.link.add(this);
        if (signal !== undefined) this.#endWith(signal);
        return this;
      } catch (error) {
        if (!(error instanceof Disconnected) || this.link.status.state === "closed") throw error;
      }
    }
  }

  #endWith(signal: AbortSignal): void {
    if (signal.aborted) {
      this.close();
      throw cancelled();
    }
    const abort = () => this.close();
    signal.addEventListener("abort", abort);
    this.#unbind = () => signal.removeEventListener("abort", abort);
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
  interrupted(error: GatewayError, final: boolean, own = false): void {
    this.number = null;
    if (final) this.end(own ? null : error);
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
    this.#unbind();
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
    // the tenant or its folder was replaced: watch the new one
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
  #source: string | null = null;
  #position: string | number | null = null;
  #named = false;

  /** Where it stands, as `lastEventId` of a later feed; in a cluster the id of an event alone may be any member's. */
  get position(): string | number | null {
    return this.#position;
  }

  protected override key(result: Record<string, unknown>): number {
    const { position, lastEventId } = result;
    this.#named = typeof position === "string" && position.includes(":");
    if (this.#position === null) {
      this.#last = Number(lastEventId);
      this.#position = this.#named ? String(position) : this.#last;
    }
    return Number(result.subscription);
  }

  protected override async ask(connection: Connection): Promise<void> {
    const params = this.#position === null ? this.params : { ...this.params, lastEventId: this.#position };
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
    const same = this.#source === null || this.#source === event.source;
    if (same && this.#last !== null && id <= this.#last && event.type !== "gap") return false;
    this.#last = id;
    this.#source = event.source;
    this.#position = this.#named ? `${event.source.split("/").at(-1)}:${id}` : id;
    if (!this.push(event)) {
      this.clear();
      this.push({ ...event, type: "gap", data: { oldest: id + 1 } });
    }
    return true;
  }
}
