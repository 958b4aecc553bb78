/** One output stream of a command: its unread bytes. */

import { GatewayError } from "./errors.js";

export type StreamName = "stdout" | "stderr";

/** One output stream, as an async iterable of bytes. `offset` counts the bytes since the command began. */
export class Output implements AsyncIterable<Uint8Array> {
  offset = 0;
  /** Bytes that the gateway's buffer or this one dropped unread. */
  lost = 0;
  /** @internal */ size = 0;
  /** @internal */ begun = false;
  /** @internal How much of it the gateway knows to be read. */ acked = 0;
  readonly #chunks: Uint8Array[] = [];
  readonly #taken: () => void;
  #ended = false;
  #error: GatewayError | null = null;
  #wake: (() => void)[] = [];

  /** @internal */
  constructor(taken: () => void) {
    this.#taken = taken;
  }

  async *[Symbol.asyncIterator](): AsyncIterator<Uint8Array> {
    this.begun = true;
    try {
      for (;;) {
        const chunk = this.take();
        if (chunk !== undefined) yield chunk;
        else if (this.#error !== null) throw this.#error;
        else if (this.#ended) return;
        else await this.changed();
      }
    } finally {
      this.left();
    }
  }

  /** The same as a ReadableStream; cancelling it stops reading. */
  get readable(): ReadableStream<Uint8Array> {
    const iterator = this[Symbol.asyncIterator]();
    this.begun = true;
    return new ReadableStream<Uint8Array>(
      {
        pull: async (stream) => {
          const { done, value } = await iterator.next();
          if (done) stream.close();
          else stream.enqueue(value);
        },
        cancel: () => this.left(),
      },
      { highWaterMark: 0 }, // what waits is bounded by `buffer` already
    );
  }

  /**
   * Returns the rest of it as text, whole: throws `too_large` if some was dropped. Unbounded, so only for output that is
   * known to be small. Read first and `wait` then: of unread output only the last bytes are kept.
   */
  async text(): Promise<string> {
    const decoder = new TextDecoder();
    let text = "";
    for await (const chunk of this) text += decoder.decode(chunk, { stream: true });
    if (this.lost === 0) return text + decoder.decode();
    const words = `${this.lost} bytes of this output were dropped before anybody read it`;
    throw new GatewayError("too_large", `${words}: read it before you wait for the end`, { lost: this.lost });
  }

  /** The offset up to which everything has been read. */
  get taken(): number {
    return this.begun ? this.offset - this.size : this.offset;
  }

  /** @internal */
  take(): Uint8Array | undefined {
    const chunk = this.#chunks.shift();
    if (chunk !== undefined) {
      this.size -= chunk.length;
      this.#taken();
    }
    return chunk;
  }

  /** @internal Marks it as no longer read, so that it blocks nothing. */
  left(): void {
    this.begun = false;
    this.#taken();
  }

  /** @internal */
  changed(): Promise<void> {
    return new Promise((resolve) => this.#wake.push(resolve));
  }

  /** @internal */
  push(data: Uint8Array): void {
    this.#chunks.push(data);
    this.size += data.length;
    this.wake();
  }

  /** @internal Drops the oldest chunks over `limit`. */
  trim(limit: number): void {
    while (this.size > limit) {
      const chunk = this.#chunks.shift();
      if (chunk === undefined) return;
      this.size -= chunk.length;
      this.lost += chunk.length;
    }
  }

  /** @internal */
  end(error: GatewayError | null): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#error = error;
    this.wake();
  }

  /** @internal */
  get ended(): boolean {
    return this.#ended && this.#chunks.length === 0;
  }

  /** @internal */
  wake(): void {
    for (const wake of this.#wake.splice(0)) wake();
  }
}

/** Yields the chunks of both streams as they come. */
export async function* merged(
  stdout: Output,
  stderr: Output,
): AsyncGenerator<{ stream: StreamName; data: Uint8Array }> {
  stdout.begun = stderr.begun = true;
  try {
    for (;;) {
      let found = false;
      for (const [stream, output] of [
        ["stdout", stdout],
        ["stderr", stderr],
      ] as const) {
        const data = output.take();
        if (data !== undefined) {
          found = true;
          yield { stream, data };
        }
      }
      if (found) continue;
      if (stdout.ended && stderr.ended) return;
      await Promise.race([stdout.changed(), stderr.changed()]);
    }
  } finally {
    stdout.left();
    stderr.left();
  }
}
