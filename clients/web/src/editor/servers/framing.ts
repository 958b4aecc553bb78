/** The language server protocol's frames: a header with the length of the JSON text after it, in bytes. */

/** Limits of a message and a header; no server sends larger ones. */
const MESSAGE_MAX = 32 << 20;
const HEADER_MAX = 4096;

const encoder = new TextEncoder();
const decoder = new TextDecoder();

export function frame(message: string): Uint8Array {
  const body = encoder.encode(message);
  const head = encoder.encode(`Content-Length: ${body.length}\r\n\r\n`);
  const framed = new Uint8Array(head.length + body.length);
  framed.set(head);
  framed.set(body, head.length);
  return framed;
}

/** Parses messages from bytes as they arrive. */
export class Frames {
  #parts: Uint8Array[] = [];
  #size = 0;
  /** Bytes needed for the next step. */
  #wanted = 1;
  /** The length of the message whose header has been read. */
  #length: number | null = null;

  /** Adds bytes; returns the messages that are complete. Throws if the bytes are not frames. */
  push(data: Uint8Array): readonly string[] {
    this.#parts.push(data);
    this.#size += data.length;
    const messages: string[] = [];
    while (this.#size >= this.#wanted) {
      const bytes = this.#joined();
      if (this.#length === null) {
        const end = endOfHeader(bytes);
        if (end === null) {
          if (bytes.length > HEADER_MAX)
            throw new Error("The language server sent something other than messages.");
          this.#wanted = bytes.length + 1;
          break;
        }
        const found = /^content-length: *(\d{1,9})\s*$/im.exec(decoder.decode(bytes.subarray(0, end)));
        const length = Number(found?.[1] ?? -1);
        if (length < 0 || length > MESSAGE_MAX)
          throw new Error("The language server sent too large a message.");
        this.#keep(bytes.subarray(end + 4));
        this.#length = length;
        this.#wanted = length;
      } else {
        messages.push(decoder.decode(bytes.subarray(0, this.#length)));
        this.#keep(bytes.subarray(this.#length));
        this.#length = null;
        this.#wanted = 1;
      }
    }
    return messages;
  }

  #joined(): Uint8Array {
    if (this.#parts.length !== 1) {
      const joined = new Uint8Array(this.#size);
      let at = 0;
      for (const part of this.#parts) {
        joined.set(part, at);
        at += part.length;
      }
      this.#parts = [joined];
    }
    return this.#parts[0]!;
  }

  #keep(rest: Uint8Array): void {
    this.#parts = [rest];
    this.#size = rest.length;
  }
}

function endOfHeader(bytes: Uint8Array): number | null {
  const last = Math.min(bytes.length, HEADER_MAX + 4) - 4;
  for (let at = 0; at <= last; at++)
    if (bytes[at] === 13 && bytes[at + 1] === 10 && bytes[at + 2] === 13 && bytes[at + 3] === 10) return at;
  return null;
}
