/** What agents changed in one tenant, turn by turn, and how to undo it. */

import type { Link } from "./link.js";
import type { Turn, TurnChanges, Undone } from "./types.js";

export class History {
  readonly #link: Link;

  /** @internal */
  constructor(link: Link) {
    this.#link = link;
  }

  /**
   * Begins a turn of this tool session; `title` is the request to the agent. This ends the previous turn, which is
   * returned if it changed anything.
   */
  async begin(
    title = "",
    options: { readonly agent?: string | undefined; readonly signal?: AbortSignal | undefined } = {},
  ): Promise<Turn | null> {
    const { signal, ...by } = options;
    const asked = { title, ...by };
    return (await this.#link.request<{ before: Turn | null }>("turn/begin", asked, { signal })).before;
  }

  /** Ends this tool session's turn and returns it as recorded, null if nothing changed. */
  async end(signal?: AbortSignal): Promise<Turn | null> {
    return (await this.#link.request<{ turn: Turn | null }>("turn/end", {}, { signal })).turn;
  }

  /** Lists the turns, latest first; with `before`, a turn's id, those before it. */
  list(
    options: {
      readonly limit?: number | undefined;
      readonly before?: string | undefined;
      readonly signal?: AbortSignal | undefined;
    } = {},
  ): Promise<{ readonly turns: readonly Turn[]; readonly more: boolean }> {
    const { signal, ...asked } = options;
    return this.#link.request("history/list", asked, { signal });
  }

  /** Returns a turn with its changes. */
  turn(turn: string, signal?: AbortSignal): Promise<TurnChanges> {
    return this.#link.request("history/diff", { turn }, { signal });
  }

  /**
   * Restores the files as they were right after a turn, or before it, and returns that as a new turn; null if nothing
   * changes. Later changes are taken back with it; `undo` keeps them. Throws a `conflict` if something unrecorded is in the way.
   */
  async restore(turn: string, to: "after" | "before" = "after", signal?: AbortSignal): Promise<Turn | null> {
    const asked = { turn, to };
    return (await this.#link.request<{ turn: Turn | null }>("history/restore", asked, { signal })).turn;
  }

  /**
   * Takes back exactly what a turn changed, by default the last one; what was changed later stays. Returns the undo as a
   * new turn, null if nothing changes. If there are `conflicts`, paths where later changes are of the same lines,
   * nothing was changed; those named in `force` become what they were before the turn.
   */
  async undo(
    turn?: string,
    options: {
      readonly force?: readonly string[] | undefined;
      readonly signal?: AbortSignal | undefined;
    } = {},
  ): Promise<Undone> {
    const { signal, force = [] } = options;
    const undone = turn ?? (await this.list({ limit: 1, signal })).turns[0]?.turn;
    if (undone === undefined) return { turn: null, conflicts: [] };
    const asked = force.length > 0 ? { turn: undone, force } : { turn: undone };
    return this.#link.request("history/undo", asked, { signal });
  }
}
