/** What agents changed, turn by turn; one is looked at closer, taken back, or gone back to. */

import {
  GatewayError,
  type GatewayEvent,
  type Tenant,
  type Turn,
  type TurnChanges,
} from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { say } from "./toasts.js";

const PAGE = 50;

export class History {
  readonly #tenant: () => Tenant;
  readonly turns = signal<readonly Turn[]>([]);
  readonly more = signal(false);
  readonly failure = signal<string | null>(null);
  readonly busy = signal(false);
  /** The turn that is looked at, and what it changed once that is known. */
  readonly open = signal<string | null>(null);
  readonly shown = signal<TurnChanges | null>(null);
  #asked = false;
  /** For each list that is being loaded, the turns that were told meanwhile: its answer may be without them. */
  readonly #meanwhile = new Set<Turn[]>();

  constructor(tenant: () => Tenant) {
    this.#tenant = tenant;
  }

  /** Loads the latest turns. */
  look(): Promise<void> {
    this.#asked = true;
    const told: Turn[] = [];
    this.#meanwhile.add(told);
    return this.#try(async () => {
      try {
        const { turns, more } = await this.#tenant().history.list({ limit: PAGE });
        this.turns.value = [
          ...told.filter(({ turn }) => !turns.some((known) => known.turn === turn)),
          ...turns,
        ];
        this.more.value = more;
      } finally {
        this.#meanwhile.delete(told);
      }
    });
  }

  older(): Promise<void> {
    const before = this.turns.value.at(-1)?.turn;
    if (before === undefined) return this.look();
    return this.#try(async () => {
      const { turns, more } = await this.#tenant().history.list({ limit: PAGE, before });
      this.turns.value = [...this.turns.value, ...turns];
      this.more.value = more;
    });
  }

  /** Looks at a turn closer, or no longer. */
  async toggle(turn: string): Promise<void> {
    this.shown.value = null;
    if (this.open.value === turn) {
      this.open.value = null;
      return;
    }
    this.open.value = turn;
    await this.#try(async () => {
      const shown = await this.#tenant().history.turn(turn);
      if (this.open.value === turn) this.shown.value = shown;
    });
  }

  /** Makes the files what they were before a turn, or right after it. */
  restore(turn: string, to: "before" | "after"): Promise<void> {
    return this.#try(async () => {
      const done = await this.#tenant().history.restore(turn, to);
      say(
        done === null
          ? "Nothing to do: the files are already in that state."
          : `${done.title.split("\n")[0]}: done. It can be undone too.`,
      );
      await this.look();
    });
  }

  take(event: GatewayEvent): void {
    if (event.type !== "turn.committed" || !this.#asked) return;
    const turn = event.data as unknown as Turn;
    for (const told of this.#meanwhile) told.unshift(turn);
    if (!this.turns.value.some((known) => known.turn === turn.turn))
      this.turns.value = [turn, ...this.turns.value];
  }

  async #try(work: () => Promise<void>): Promise<void> {
    this.busy.value = true;
    this.failure.value = null;
    try {
      await work();
    } catch (error) {
      this.failure.value = error instanceof GatewayError ? error.message : String(error);
    } finally {
      this.busy.value = false;
    }
  }
}
