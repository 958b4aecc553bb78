/** The client's end of `gateway.v1`: frames and JSON-RPC texts, without IO. */

import { type ErrorCode, type Facts, GatewayError } from "./errors.js";

export const SUBPROTOCOL = "gateway.v1";
export const VERSION = 1;

export const STDIN = 0;
export const STDOUT = 1;
export const STDERR = 2;

/** u8 stream, u32 channel big-endian */
const HEADER = 5;

export interface Frame {
  readonly stream: number;
  readonly channel: number;
  readonly data: Uint8Array;
}

/** Returns the binary frame that carries `data` of `stream` on `channel`. */
export function packFrame(stream: number, channel: number, data: Uint8Array): Uint8Array<ArrayBuffer> {
  const frame = new Uint8Array(HEADER + data.length);
  const view = new DataView(frame.buffer);
  view.setUint8(0, stream);
  view.setUint32(1, channel);
  frame.set(data, HEADER);
  return frame;
}

/** Returns the parts of a frame; `data` is a view of it. Throws if it is not one. */
export function unpackFrame(frame: ArrayBuffer | Uint8Array): Frame {
  const bytes = frame instanceof Uint8Array ? frame : new Uint8Array(frame);
  if (bytes.length < HEADER) {
    throw new GatewayError("invalid_params", `a binary frame has at least ${HEADER} bytes`);
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const stream = view.getUint8(0);
  if (stream > STDERR) throw new GatewayError("invalid_params", `unknown stream ${stream}`);
  return { stream, channel: view.getUint32(1), data: bytes.subarray(HEADER) };
}

export type RequestId = number | string;

export interface RpcFailure {
  readonly number: number;
  readonly message: string;
  readonly code: ErrorCode;
  readonly facts: Facts;
}

export interface Reply {
  readonly kind: "reply";
  readonly id: RequestId | null;
  readonly result?: unknown;
  readonly error?: RpcFailure;
}

export interface Notification {
  readonly kind: "notification";
  readonly method: string;
  readonly params: Readonly<Record<string, unknown>>;
}

/** Returns the text of a call. */
export function request(id: RequestId, method: string, params: object = {}): string {
  return JSON.stringify({ jsonrpc: "2.0", id, method, params });
}

/** Returns the text of a notification. */
export function notification(method: string, params: object): string {
  return JSON.stringify({ jsonrpc: "2.0", method, params });
}

/** Returns the notification that ends a pending call. */
export function cancelRequest(id: RequestId): string {
  return JSON.stringify({ jsonrpc: "2.0", method: "$/cancelRequest", params: { id } });
}

/** Parses a server's message. Throws `invalid_params` if it is not of this protocol. */
export function decodeServerText(text: string): Reply | Notification {
  try {
    const message = JSON.parse(text) as Record<string, unknown>;
    if ("method" in message) {
      return {
        kind: "notification",
        method: String(message.method),
        params: (message.params ?? {}) as Record<string, unknown>,
      };
    }
    if (!("id" in message)) throw new TypeError();
    const id = message.id as RequestId | null;
    if ("error" in message) {
      const error = message.error as { code: number; message: string; data?: Record<string, unknown> };
      const { code = "unavailable", ...facts } = error.data ?? {};
      if (typeof error.code !== "number" || typeof error.message !== "string") throw new TypeError();
      return {
        kind: "reply",
        id,
        error: { number: error.code, message: error.message, code: String(code), facts },
      };
    }
    if (!("result" in message)) throw new TypeError();
    return { kind: "reply", id, result: message.result };
  } catch {
    throw new GatewayError("invalid_params", "the server's message is not gateway.v1");
  }
}

// --- Server-Sent Events --------------------------------------------------------------------------------

export interface ServerSent {
  readonly type: string;
  readonly data: string;
  readonly id: string;
}

/** A parser of Server-Sent Events (WHATWG HTML §9.2.6) for text in chunks. */
export class EventParser {
  #rest = "";
  #begun = false;
  #type = "";
  #data: string[] = [];
  lastId = "";

  /** Returns the events that `chunk` completes. */
  feed(chunk: string): ServerSent[] {
    let text = this.#rest + chunk;
    if (!this.#begun && text.length > 0) {
      this.#begun = true;
      if (text.startsWith("\ufeff")) text = text.slice(1);
    }
    const found: ServerSent[] = [];
    let start = 0;
    for (let at = 0; at < text.length; at++) {
      const char = text[at];
      if (char !== "\n" && char !== "\r") continue;
      if (char === "\r" && at + 1 === text.length) break; // may be the first half of a CRLF
      const event = this.#line(text.slice(start, at));
      if (event !== null) found.push(event);
      if (char === "\r" && text[at + 1] === "\n") at++;
      start = at + 1;
    }
    this.#rest = text.slice(start);
    return found;
  }

  #line(line: string): ServerSent | null {
    if (line === "") {
      const event =
        this.#data.length > 0
          ? { type: this.#type || "message", data: this.#data.join("\n"), id: this.lastId }
          : null;
      this.#type = "";
      this.#data = [];
      return event;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#type = value;
    else if (name === "id" && !value.includes("\0")) this.lastId = value;
    return null;
  }
}
