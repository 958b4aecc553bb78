/** What agents changed, turn by turn: to view, undo or restore. */

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

export interface UndoConflict {
  readonly turn: string;
  readonly paths: readonly string[];
}

export class History {
  readonly #tenant: () => Tenant;
  readonly turns = signal<readonly Turn[]>([]);
  readonly more = signal(false);
  readonly failure = signal<string | null>(null);
  readonly busy = signal(false);
  /** The open turn, and its changes once they are known. */
  readonly open = signal<string | null>(null);
  readonly shown = signal<TurnChanges | null>(null);
  /** A turn whose undo conflicts with later changes at these paths. */
  readonly conflict = signal<UndoConflict | null>(null);
  #asked = false;
  /** For each list that is loading, the turns that were recorded meanwhile: its answer may lack them. */
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

  /** Takes back exactly what a turn changed; asks first if later changes touch the same lines. */
  undo(turn: string, force: readonly string[] = []): Promise<void> {
    this.conflict.value = null;
    return this.#try(async () => {
      const { turn: done, conflicts } = await this.#tenant().history.undo(turn, { force });
      if (conflicts.length > 0) this.conflict.value = { turn, paths: conflicts };
      else this.#done(done);
      await this.look();
    });
  }

  /** Makes the files what they were right after a turn. */
  restore(turn: string): Promise<void> {
    return this.#try(async () => {
      this.#done(await this.#tenant().history.restore(turn, "after"));
      await this.look();
    });
  }

  #done(turn: Turn | null): void {
    if (turn === null) {
      say("Nothing to do: the files are already in that state.");
      return;
    }
    const files = `${turn.files} ${turn.files === 1 ? "file" : "files"} restored.`;
    const undone = turn.title.startsWith("Undo: ");
    const text = undone ? `Undone. ${files}` : turn.title.startsWith("Redo: ") ? `Redone. ${files}` : files;
    say(text, "info", { label: undone ? "Redo" : "Undo", run: () => void this.undo(turn.turn) });
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
