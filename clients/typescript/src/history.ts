/** What agents changed in one tenant, turn by turn, and the way back. */

import type { Link } from "./link.js";
import type { Turn, TurnChanges } from "./types.js";

export class History {
  readonly #link: Link;

  /** @internal */
  constructor(link: Link) {
    this.#link = link;
  }

  /**
   * Begins a turn of this tool session; `title` is what the agent was asked. Returns the turn before, which ends,
   * where it changed anything.
   */
  async begin(title = "", options: { readonly agent?: string } = {}): Promise<Turn | null> {
    return (await this.#link.request<{ before: Turn | null }>("turn/begin", { title, ...options })).before;
  }

  /** Ends this tool session's turn and returns it as recorded, null where nothing changed. */
  async end(): Promise<Turn | null> {
    return (await this.#link.request<{ turn: Turn | null }>("turn/end")).turn;
  }

  /** Lists the turns, latest first; `before` is the id of one, for those before it. */
  list(
    options: { readonly limit?: number; readonly before?: string; readonly signal?: AbortSignal } = {},
  ): Promise<{ readonly turns: readonly Turn[]; readonly more: boolean }> {
    const { signal, ...asked } = options;
    return this.#link.request("history/list", asked, { signal });
  }

  /** Returns a turn with what it changed. */
  turn(turn: string, signal?: AbortSignal): Promise<TurnChanges> {
    return this.#link.request("history/diff", { turn }, { signal });
  }

  /**
   * Makes the files what they were right after a turn, or before it, and returns that as a turn of its own; null where
   * they are so. Throws a `conflict` where something that is not recorded is in the way.
   */
  async restore(turn: string, to: "after" | "before" = "after"): Promise<Turn | null> {
    return (await this.#link.request<{ turn: Turn | null }>("history/restore", { turn, to })).turn;
  }
}
