/** Keeps the token that a gateway is asked with, and asks for another where the caller gave a function. */

import { GatewayError } from "./errors.js";

/** A token, or a function that returns one that is valid now. It is called whenever another is needed. */
export type TokenSource = string | (() => string | Promise<string>);

export class Credential {
  readonly #ask: (() => string | Promise<string>) | null;
  #known: string | null;
  #asking: Promise<string> | null = null;

  constructor(source: TokenSource | undefined) {
    this.#ask = typeof source === "function" ? source : null;
    this.#known = typeof source === "string" ? source : null;
  }

  /** Whether another token can be had. */
  get renewable(): boolean {
    return this.#ask !== null;
  }

  /** Whether there is no token at all, and a browser's cookie says who asks. */
  get absent(): boolean {
    return this.#ask === null && this.#known === null;
  }

  /** Returns the token to ask with; null where there is none. */
  async current(): Promise<string | null> {
    return this.#known ?? (this.#ask === null ? null : await this.renewed(null));
  }

  /**
   * Returns another token than `stale`: one that was got meanwhile, else one that is asked for now. Those who ask at
   * the same time share one call. Throws `unavailable` where the caller's function fails.
   */
  async renewed(stale: string | null): Promise<string> {
    if (this.#known !== null && this.#known !== stale) return this.#known;
    const ask = this.#ask;
    if (ask === null) throw new GatewayError("unauthorized", "there is no other token");
    this.#asking ??= (async () => {
      try {
        const token = await ask();
        if (typeof token !== "string" || token === "") throw new TypeError("it returned no token");
        this.#known = token;
        return token;
      } catch (error) {
        const reason = error instanceof Error ? error.message : String(error);
        throw new GatewayError("unavailable", `the function given as \`token\` failed: ${reason}`);
      } finally {
        this.#asking = null;
      }
    })();
    return await this.#asking;
  }

  /** Returns the token for a new connection: a fresh one, or the one at hand where none can be had now. */
  async fresh(): Promise<string | null> {
    if (this.#ask === null) return this.#known;
    try {
      return await this.renewed(this.#known);
    } catch (error) {
      if (this.#known === null) throw error;
      return this.#known;
    }
  }

  /** Forgets a token that the gateway refused, so that it is not sent again. */
  refused(token: string | null): void {
    if (this.#ask !== null && this.#known === token) this.#known = null;
  }
}
