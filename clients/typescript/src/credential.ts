/** The token for a gateway, and how to get another if the caller gave a function. */

import { GatewayError } from "./errors.js";

/** A token, or a function that returns a valid one. It is called whenever another is needed. */
export type TokenSource = string | (() => string | Promise<string>);

export class Credential {
  readonly #ask: (() => string | Promise<string>) | null;
  #known: string | null;
  #asking: Promise<string> | null = null;

  constructor(source: TokenSource | undefined) {
    this.#ask = typeof source === "function" ? source : null;
    this.#known = typeof source === "string" ? trimmed(source) : null;
  }

  /** Whether another token can be had. */
  get renewable(): boolean {
    return this.#ask !== null;
  }

  /** Whether there is no token at all, and a browser's cookie identifies the user. */
  get absent(): boolean {
    return this.#ask === null && this.#known === null;
  }

  /** Returns the current token; null if there is none. */
  async current(): Promise<string | null> {
    return this.#known ?? (this.#ask === null ? null : await this.renewed(null));
  }

  /**
   * Returns another token than `stale`: one obtained meanwhile, or a new one. Concurrent callers share one call of the
   * function. Throws `unavailable` if that fails.
   */
  async renewed(stale: string | null): Promise<string> {
    if (this.#known !== null && this.#known !== stale) return this.#known;
    const ask = this.#ask;
    if (ask === null) throw new GatewayError("unauthorized", "there is no other token");
    this.#asking ??= (async () => {
      try {
        const token = trimmed(await ask());
        if (token === "") throw new TypeError("it returned no token");
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

  /** Returns the token for a new connection: a fresh one, or the current one if that fails. */
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

/** Returns a token without the line's end that files and stores of secrets add; a header could not hold it. */
function trimmed(token: unknown): string {
  const text = typeof token === "string" ? token.trim() : "";
  if (!/^[\x21-\x7e]*$/.test(text))
    throw new TypeError("this is no token: it has spaces or characters that none has");
  return text;
}
