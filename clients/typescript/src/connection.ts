/** One websocket to a tenant: calls with answers, frames by channel. It never reconnects. */

import { cancelled, Disconnected, fatalClose, GatewayError } from "./errors.js";
import type { ServerInfo } from "./types.js";
import {
  cancelRequest,
  decodeServerText,
  type Frame,
  type Notification,
  notification,
  packFrame,
  request,
  STDIN,
  SUBPROTOCOL,
  unpackFrame,
} from "./wire.js";

const OPEN_TIMEOUT = 15_000;
/** How long to wait for the close that should follow an error. */
const CLOSE_TIMEOUT = 1_000;
/** Below any gateway's frame limit, and large enough to be fast. */
const CHUNK = 256 * 1024;

/** The part of a WebSocket that is used; that of browsers and that of the package `ws` both have it. */
export interface SocketLike {
  binaryType: string;
  readonly readyState: number;
  readonly bufferedAmount: number;
  onopen: ((event: never) => void) | null;
  onmessage: ((event: never) => void) | null;
  onerror: ((event: never) => void) | null;
  onclose: ((event: never) => void) | null;
  send(data: string | Uint8Array<ArrayBuffer>): void;
  close(code?: number, reason?: string): void;
}

export type SocketConstructor = new (url: string, protocols?: string | string[]) => SocketLike;

export interface Listener {
  notified(notification: Notification): void;
  closed(error: GatewayError): void;
}

interface Pending {
  resolve(value: unknown): void;
  reject(error: GatewayError): void;
  accept: ((result: never) => void) | undefined;
}

export class Connection {
  readonly channels = new Map<number, (frame: Frame) => void>();
  readonly #socket: SocketLike;
  readonly #listener: Listener;
  readonly #pending = new Map<number, Pending>();
  #failure: GatewayError | null = null;
  #lastId = 0;
  /** The gateway's answer to `initialize`; undefined until then. */
  server!: ServerInfo;

  private constructor(socket: SocketLike, listener: Listener) {
    this.#socket = socket;
    this.#listener = listener;
  }

  /** Connects and initializes. Throws the error of a refusal, `Disconnected` without an answer. */
  static async open(
    kind: SocketConstructor,
    url: string,
    initialize: object,
    listener: Listener,
    timeout = OPEN_TIMEOUT,
  ): Promise<Connection> {
    const socket = new kind(url, SUBPROTOCOL);
    socket.binaryType = "arraybuffer";
    const connection = new Connection(socket, listener);
    let timer: ReturnType<typeof setTimeout> | undefined;
    try {
      await new Promise<void>((resolve, reject) => {
        timer = setTimeout(() => reject(new Disconnected("the gateway does not answer")), timeout);
        socket.onopen = () => resolve();
        // a close follows, which is all that browsers tell; other runtimes give the reason here, some only here
        let failed = "";
        socket.onerror = (event?: { message?: string; error?: Error }) => {
          failed = event?.error?.message || event?.message || "";
          if (connection.server !== undefined) return;
          clearTimeout(timer);
          timer = setTimeout(() => reject(new Disconnected(failed || "it cannot be reached")), CLOSE_TIMEOUT);
        };
        socket.onmessage = (event: { data: string | ArrayBuffer }) => connection.#receive(event.data);
        socket.onclose = (event: { code: number; reason: string }) => {
          const fatal = fatalClose(event.code, event.reason);
          // a token may end at any time: requests under way may have taken effect
          const ended = fatal?.code === "unauthorized" && connection.server !== undefined;
          const error = ended
            ? new Disconnected(fatal.message, "unauthorized")
            : (fatal ?? new Disconnected(event.reason || failed || `the connection broke (${event.code})`));
          connection.#fail(error);
          reject(error);
        };
      });
      const answered = connection.request<ServerInfo>("initialize", initialize);
      const late = new Promise<never>((_, reject) => {
        clearTimeout(timer);
        timer = setTimeout(() => reject(new Disconnected("the gateway does not answer initialize")), timeout);
      });
      connection.server = await Promise.race([answered, late]);
      return connection;
    } catch (error) {
      connection.close();
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  get alive(): boolean {
    return this.#failure === null;
  }

  /**
   * Calls `method`. `accept` is called with the result before the next frame is handled, so that it can prepare for
   * that. An aborted call is cancelled in the gateway too.
   */
  request<Result>(
    method: string,
    params: object = {},
    accept?: (result: Result) => void,
    signal?: AbortSignal,
  ): Promise<Result> {
    return new Promise<Result>((resolve, reject) => {
      if (this.#failure !== null) return reject(this.#failure);
      if (signal?.aborted) return reject(cancelled());
      const id = ++this.#lastId;
      const text = request(id, method, params);
      const refused = this.#tooLarge(text);
      if (refused !== null) return reject(refused);
      const abort = () => {
        this.#pending.delete(id);
        if (this.alive) this.#socket.send(cancelRequest(id));
        reject(cancelled());
      };
      const settled = () => signal?.removeEventListener("abort", abort);
      this.#pending.set(id, {
        resolve: (value) => {
          settled();
          resolve(value as Result);
        },
        reject: (error) => {
          settled();
          reject(error);
        },
        accept: accept as ((result: never) => void) | undefined,
      });
      signal?.addEventListener("abort", abort);
      this.#socket.send(text);
    });
  }

  /** Sends a notification, which has no answer. */
  notify(method: string, params: object): void {
    if (this.alive) this.#socket.send(notification(method, params));
  }

  /** Refuses larger messages: for those the gateway would close the socket, with everything that shares it. */
  #tooLarge(text: string): GatewayError | null {
    const { maxFrame: limit } = (this.server as ServerInfo | undefined)?.limits ?? {};
    // a character has at most three bytes for each of its UTF-16 units
    if (limit === undefined || text.length * 3 <= limit) return null;
    const size = new TextEncoder().encode(text).length;
    if (size <= limit) return null;
    const words = `${size} bytes are more than the ${limit} that the gateway takes at once`;
    return new GatewayError("too_large", words, { size, limit });
  }

  /** Sends bytes to the input of the command on `channel`; resolves once the socket has room again. */
  async input(channel: number, data: Uint8Array): Promise<void> {
    for (let start = 0; start < data.length; start += CHUNK) {
      if (this.#failure !== null) throw this.#failure;
      this.#socket.send(packFrame(STDIN, channel, data.subarray(start, start + CHUNK)));
      // a WebSocket has no event for this, only the number of bytes not sent yet
      while (this.#socket.bufferedAmount > 4 * CHUNK && this.alive) {
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    }
  }

  close(error: GatewayError = new Disconnected("this connection was closed")): void {
    this.#fail(error);
    this.#socket.close(1000);
  }

  #receive(data: string | ArrayBuffer): void {
    if (this.#failure !== null) return;
    try {
      if (typeof data !== "string") {
        const frame = unpackFrame(data);
        this.channels.get(frame.channel)?.(frame);
        return;
      }
      const message = decodeServerText(data);
      if (message.kind === "notification") {
        this.#listener.notified(message);
        return;
      }
      const pending = typeof message.id === "number" ? this.#pending.get(message.id) : undefined;
      if (pending === undefined) return;
      this.#pending.delete(message.id as number);
      if (message.error !== undefined) {
        pending.reject(new GatewayError(message.error.code, message.error.message, message.error.facts));
      } else {
        pending.accept?.(message.result as never);
        pending.resolve(message.result);
      }
    } catch (error) {
      this.close(error instanceof GatewayError ? error : new GatewayError("invalid_params", String(error)));
    }
  }

  #fail(error: GatewayError): void {
    if (this.#failure !== null) return;
    this.#failure = error;
    const pending = [...this.#pending.values()];
    this.#pending.clear();
    for (const call of pending) call.reject(error);
    this.#listener.closed(error);
  }
}
