/** Renews a connection's token before it ends. */

import { type Backoff, pause } from "./backoff.js";

/** A token is renewed this many milliseconds before its end, or when a tenth of its life is left if that is less. */
const AHEAD = 60_000;
/** The most that a timer can hold. */
const LONGEST = 2 ** 31 - 1;

export class Renewal {
  /** Renews the token, and returns whether that is over: done, or no longer needed. */
  readonly #renew: () => Promise<boolean>;
  readonly #backoff: Backoff | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(renew: () => Promise<boolean>, backoff: Backoff | undefined) {
    this.#renew = renew;
    this.#backoff = backoff;
  }

  /** Renews the token in time before it ends, in seconds since the epoch. */
  before(expires: number): void {
    this.stop();
    const left = expires * 1000 - Date.now();
    if (left <= 0) return; // the gateway accepts it, so our clock is wrong: the gateway will close the connection
    const wait = Math.max(1000, left - Math.min(AHEAD, left / 10));
    this.#timer = setTimeout(
      () => (wait > LONGEST ? this.before(expires) : void this.#now()),
      Math.min(wait, LONGEST),
    );
  }

  stop(): void {
    clearTimeout(this.#timer);
  }

  /** Tries until it is over. */
  async #now(failures = 0): Promise<void> {
    if (await this.#renew()) return;
    this.#timer = setTimeout(() => void this.#now(failures + 1), pause(failures + 1, this.#backoff));
  }
}
