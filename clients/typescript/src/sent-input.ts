/** The input of a command that was sent, kept for a while to be sent again after a break. */

/** The most bytes that are kept, unless a single chunk is larger: more than the buffers on the way can hold. */
export const SENT = 16 << 20;

export class SentInput {
  #chunks: Uint8Array[] = [];
  #size = 0;
  #total = 0;

  /** Keeps a chunk that is being sent, and drops the oldest beyond `SENT` bytes. */
  add(data: Uint8Array): void {
    this.#chunks.push(data);
    this.#size += data.length;
    this.#total += data.length;
    while (this.#size - (this.#chunks[0]?.length ?? 0) > SENT)
      this.#size -= this.#chunks.shift()?.length ?? 0;
  }

  /** Whether anything was sent. */
  get any(): boolean {
    return this.#total > 0;
  }

  /**
   * Takes out what follows the first `arrived` bytes of this attachment's input, to be sent and added again; null if
   * that is no longer kept.
   */
  after(arrived: number): Uint8Array[] | null {
    let skip = this.#size - (this.#total - arrived);
    if (skip < 0) return null;
    const chunks = this.#chunks;
    this.#chunks = [];
    [this.#size, this.#total] = [0, arrived];
    const missing = [];
    for (const data of chunks) {
      const rest = data.subarray(Math.max(0, Math.min(skip, data.length)));
      skip -= data.length;
      if (rest.length > 0) missing.push(rest);
    }
    return missing;
  }

  /** Drops everything, for a new attachment that resumes no other. */
  forget(): void {
    this.#chunks = [];
    [this.#size, this.#total] = [0, 0];
  }
}
