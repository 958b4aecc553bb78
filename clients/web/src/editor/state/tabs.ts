/** The open documents in the order of their tabs, and which of them are shown. */

import { computed, signal } from "@preact/signals";
import type { Doc } from "./doc.js";

export type Pane = "main" | "beside";

export class Tabs {
  readonly open = signal<readonly Doc[]>([]);
  readonly active = signal<Doc | null>(null);
  /** A second document, shown next to that one; none is in both places. */
  readonly beside = signal<Doc | null>(null);
  /** Which of the two was used last. */
  readonly pane = signal<Pane>("main");
  /** The document that commands are about. */
  readonly current = computed(() =>
    this.pane.value === "beside" ? (this.beside.value ?? this.active.value) : this.active.value,
  );

  find(path: string): Doc | undefined {
    return this.open.value.find((doc) => doc.path === path);
  }

  /** Adds a document after the active one, without showing it. */
  add(doc: Doc): void {
    const at = this.active.value === null ? -1 : this.open.value.indexOf(this.active.value);
    this.open.value = at < 0 ? [...this.open.value, doc] : this.open.value.toSpliced(at + 1, 0, doc);
  }

  /** Shows an open document in the main place, unless it is visible; the focus and the commands' target stay. */
  follow(doc: Doc): void {
    if (this.active.value === doc || this.beside.value === doc) return;
    doc.focuses = false;
    this.active.value = doc;
  }

  /** Shows an open document, where it is shown already if it is. */
  activate(doc: Doc): void {
    this.pane.value = doc === this.beside.value ? "beside" : "main";
    const place = doc === this.beside.value ? this.beside : this.active;
    // a signal tells its listeners of other values only
    if (place.value === doc) place.value = null;
    place.value = doc;
  }

  /** Shows a document beside the others; what was shown there is a tab like any other. */
  split(doc: Doc): void {
    if (this.active.value === doc) {
      const others = this.open.value.filter((other) => other !== doc && other !== this.beside.value);
      this.active.value = others.at(-1) ?? this.beside.value;
    }
    this.beside.value = doc;
    this.pane.value = "beside";
  }

  /** Shows a document in one of the two places, and no more in the other. */
  place(doc: Doc, pane: Pane): void {
    if (pane === "beside") this.split(doc);
    else {
      if (this.beside.value === doc) this.beside.value = null;
      this.activate(doc);
    }
  }

  /** Shows one document alone again. */
  join(): void {
    const doc = this.beside.value;
    this.beside.value = null;
    this.pane.value = "main";
    if (doc !== null && this.active.value === null) this.active.value = doc;
  }

  /** Removes a document, and shows a neighbour in its place. */
  remove(doc: Doc): void {
    const at = this.open.value.indexOf(doc);
    this.open.value = this.open.value.toSpliced(at, 1);
    if (this.beside.value === doc) this.join();
    if (this.active.value !== doc) return;
    const others = this.open.value.filter((other) => other !== this.beside.value);
    this.active.value = others[Math.min(at, others.length - 1)] ?? null;
    if (this.active.value === null) this.join();
  }

  /** Moves a tab to the place of another. */
  reorder(doc: Doc, to: Doc): void {
    const at = this.open.value.indexOf(to);
    this.open.value = this.open.value.filter((other) => other !== doc).toSpliced(at, 0, doc);
  }

  /** Shows the tab so many places behind the current one. */
  step(by: number): void {
    const { value: open } = this.open;
    if (open.length === 0) return;
    const at = this.current.value === null ? 0 : open.indexOf(this.current.value);
    this.activate(open[(at + by + open.length) % open.length]!);
  }
}
