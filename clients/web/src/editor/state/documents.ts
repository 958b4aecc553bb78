/** The open files: their text, unsaved changes, and changes by others. */

import type { EditorState, TransactionSpec } from "@codemirror/state";
import { Disconnected, type FileChanges, GatewayError, type Tenant } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { Doc, type Left, type Place, type Theirs } from "./doc.js";
import type { Draft, Keeping } from "./drafts.js";
import { typing } from "./idle.js";
import { IMAGE, loadImage } from "./images.js";
import { load } from "./network.js";
import { within } from "./paths.js";
import { type Pane, Tabs } from "./tabs.js";
import { complain, say } from "./toasts.js";

type Code = typeof import("../code/editor.js");

/** The view that shows a document's state, if one does. */
export interface Stage {
  readonly doc: Doc | null;
  readonly pane: Pane;
  readonly focused: boolean;
  dispatch(spec: TransactionSpec): void;
}

export class Documents {
  readonly #tenant: () => Tenant;
  readonly #readOnly: () => boolean;
  readonly #keeping: Keeping | null;
  #code: Code | null = null;
  #following = "";
  readonly #moving = new Set<Promise<unknown>>();
  readonly tabs = new Tabs();
  /** The document whose conflict is being looked at. */
  readonly comparing = signal<Doc | null>(null);
  readonly stages = new Set<Stage>();

  constructor(tenant: () => Tenant, readOnly: () => boolean, keeping: Keeping | null = null) {
    this.#tenant = tenant;
    this.#readOnly = readOnly;
    this.#keeping = keeping;
  }

  get dirty(): boolean {
    return this.tabs.open.value.some((doc) => doc.dirty.value);
  }

  /** How many texts wait to be saved. */
  get queued(): number {
    return this.tabs.open.value.filter((doc) => doc.queued.value !== null).length;
  }

  /** Opens a file, or shows it where it is open. */
  async show(path: string, place?: Place): Promise<Doc> {
    let doc = this.tabs.find(path);
    if (doc === undefined) {
      doc = new Doc(path);
      doc.goTo = place ?? null;
      this.tabs.add(doc);
      this.tabs.activate(doc);
      await this.load(doc);
    } else {
      doc.goTo = place ?? null;
      this.tabs.activate(doc);
    }
    return doc;
  }

  /** Opens a file without showing it. */
  async open(path: string): Promise<Doc> {
    const found = this.tabs.find(path);
    if (found !== undefined) return found;
    const doc = new Doc(path);
    this.tabs.add(doc);
    await this.load(doc);
    return doc;
  }

  /**
   * Shows a file that somebody else wrote while `wanted`, without moving the focus. It waits while a person types in the
   * text that it would replace; of several waiting files, the last is shown.
   */
  async follow(path: string, wanted: () => boolean): Promise<void> {
    this.#following = path;
    const doc = await this.open(path);
    for (;;) {
      if (this.#following !== path || !wanted() || !this.tabs.open.value.includes(doc)) return;
      const typed = [...this.stages].some(({ pane, focused }) => pane === "main" && focused);
      const rest = typed ? typing() : 0;
      if (rest === 0) return this.tabs.follow(doc);
      await new Promise((resolve) => setTimeout(resolve, rest));
    }
  }

  /** Opens files as a page left them, with their unsaved texts; returns how many of these came back. */
  async restore(left: readonly Left[], active: string | null, drafts: readonly Draft[]): Promise<number> {
    const docs = new Map<string, Doc>();
    for (const { path } of [...left, ...drafts]) docs.set(path, new Doc(path));
    for (const place of left) docs.get(place.path)!.goTo = place;
    if (active !== null && !docs.has(active)) docs.set(active, new Doc(active));
    const shown = docs.get(active ?? "") ?? [...docs.values()][0] ?? null;
    const others = this.tabs.open.value.filter(({ path }) => !docs.has(path)); // the user opened these meanwhile
    this.tabs.open.value = [...docs.values(), ...others];
    if (this.tabs.active.value === null || docs.has(this.tabs.active.value.path))
      this.tabs.active.value = shown;
    let count = 0;
    for (const doc of [...docs.values()].sort((a, b) => Number(b === shown) - Number(a === shown))) {
      await this.load(doc, drafts.find(({ path }) => path === doc.path) ?? null);
      if (doc.dirty.value) count += 1;
    }
    return count;
  }

  /** Reads a file; what was unsaved of it in a page that is gone is brought in, as if it had been typed now. */
  async load(doc: Doc, draft: Draft | null = null): Promise<void> {
    try {
      if (IMAGE.test(doc.path)) {
        await loadImage(this.#tenant(), doc);
        return;
      }
      const [content, code] = await Promise.all([
        this.#tenant()
          .files.read(doc.path)
          .catch((error) => {
            if (draft === null || error?.code !== "not_found") throw error;
            return null;
          }),
        this.#editor(),
      ]);
      const text = content === null ? (draft?.base ?? "") : content.text;
      doc.size.value = content?.size ?? 0;
      doc.etag = content?.etag ?? null;
      if (text === undefined) {
        doc.phase.value = "binary";
        return;
      }
      const base = draft === null ? text : draft.base;
      doc.saved = base;
      doc.state = await code.makeState(base, doc.path, this.#readOnly());
      doc.dirty.value = false;
      this.#settled(doc);
      doc.gone.value = content === null;
      if (draft !== null) this.#replace(doc, draft.text);
      if (content === null) this.#dirtied(doc);
      else if (base !== text) await this.#arrived(doc, text, content.etag);
      doc.phase.value = "ready";
    } catch (error) {
      doc.failure.value = error instanceof Error ? error.message : String(error);
      doc.phase.value = "failed";
    }
  }

  async #editor(): Promise<Code> {
    this.#code ??= await load(() => import("../code/editor.js"));
    return this.#code;
  }

  /** Takes note of what was typed. */
  updated(doc: Doc, state: EditorState): void {
    const changed = doc.state?.doc !== state.doc;
    doc.state = state;
    if (changed) this.#dirtied(doc);
  }

  /** Updates whether a document has unsaved text, and keeps that as a draft. */
  #dirtied(doc: Doc): void {
    const before = doc.dirty.value;
    doc.dirty.value = doc.gone.value || doc.text !== doc.saved;
    if (!before && !doc.dirty.value) return;
    this.#keeping?.touch(doc.path, () =>
      doc.dirty.value && this.tabs.open.value.includes(doc) ? { text: doc.text, base: doc.saved } : null,
    );
  }

  /**
   * Saves a document, unless somebody else changed the same lines first: then the conflict dialog opens if the user
   * `asked` to save, otherwise a line above the text reports it.
   */
  async save(doc: Doc, asked = true): Promise<boolean> {
    if (doc.phase.value !== "ready" || doc.state === null) return false;
    if (this.#readOnly()) {
      say("This token may not write files.", "error");
      return false;
    }
    if (doc.theirs.value !== null) {
      this.#ask(doc, asked);
      return false;
    }
    if (doc.saving.value) {
      doc.queued.value = doc.text; // the running write may have an older text
      return false;
    }
    doc.queued.value = null;
    return await this.#write(doc, doc.text, doc.gone.value ? null : doc.etag, asked);
  }

  /** Saves what waited for the gateway. */
  flush(): void {
    for (const doc of this.tabs.open.value) void this.#flush(doc);
  }

  async #flush(doc: Doc): Promise<void> {
    const text = doc.queued.value;
    if (text === null || doc.saving.value) return;
    doc.queued.value = null;
    if (doc.theirs.value !== null) this.#ask(doc, false);
    else if (text !== doc.saved || doc.gone.value)
      await this.#write(doc, text, doc.gone.value ? null : doc.etag, false);
  }

  async #write(doc: Doc, text: string, etag: string | null, asked: boolean): Promise<boolean> {
    doc.saving.value = true;
    let reached = true;
    try {
      for (;;) {
        const condition = etag === null ? ({ ifNoneMatch: "*" } as const) : { ifMatch: etag };
        try {
          const wishes = { ...condition, createDirs: true };
          const written = await this.#tenant().files.write(doc.path, text, wishes);
          doc.size.value = written.size;
          return this.#saved(doc, text, written.etag);
        } catch (error) {
          if ((error as { code?: string }).code !== "conflict") throw error;
        }
        doc.queued.value = null;
        const theirs = await this.#theirs(doc).catch(() => null);
        if (theirs === null) {
          reached = false;
          doc.queued.value = text;
          return false;
        }
        // our own text, whose answer was lost
        if (theirs.text === text && theirs.etag !== null) return this.#saved(doc, text, theirs.etag);
        if (
          theirs.text === null ||
          theirs.etag === null ||
          !(await this.#inTurn(doc, () => this.#arrived(doc, theirs.text!, theirs.etag!)))
        ) {
          doc.theirs.value = theirs;
          this.#ask(doc, asked);
          return false;
        }
        // theirs is merged now, and they may have written again
        text = doc.text;
        etag = theirs.etag;
      }
    } catch (error) {
      const code = error instanceof GatewayError ? error.code : null;
      if (error instanceof Disconnected || code === "unauthorized") {
        reached = false;
        doc.queued.value ??= text;
        const when = code === "unauthorized" ? "you have signed in" : "the gateway can be reached again";
        say(`${doc.name} is saved as soon as ${when}.`);
      } else complain(error, `Saving ${doc.name}`);
      return false;
    } finally {
      doc.saving.value = false;
      if (reached) void this.#flush(doc);
      if (doc.told) void this.#look(doc);
    }
  }

  #saved(doc: Doc, text: string, etag: string): true {
    doc.etag = etag;
    doc.saved = text;
    doc.gone.value = false;
    this.#settled(doc);
    this.#dirtied(doc); // more may have been typed meanwhile
    return true;
  }

  /** Lets the user choose between ours and theirs: at once if they `asked` to save, otherwise when they want to. */
  #ask(doc: Doc, asked: boolean): void {
    if (asked) this.comparing.value = doc;
    else say(`${doc.name} is not saved: others changed the same lines.`, "error");
  }

  #settled(doc: Doc): void {
    doc.theirs.value = null;
    doc.writtenBy.value = null;
    doc.mergedWith = null;
  }

  async #theirs(doc: Doc): Promise<Theirs> {
    try {
      const present = await this.#tenant().files.read(doc.path);
      return { etag: present.etag, text: present.text ?? null };
    } catch (error) {
      if (error instanceof GatewayError && error.code === "not_found") return { etag: null, text: null };
      throw error;
    }
  }

  /**
   * Merges a file's present text into its document, which may have unsaved changes. Returns false if both changed the
   * same lines: then the user has to choose. A merge that they have begun is kept, but is no choice yet.
   */
  async #arrived(doc: Doc, text: string, etag: string): Promise<boolean> {
    doc.gone.value = false;
    if (text !== doc.saved && text !== doc.text) {
      if (!doc.dirty.value) this.#replace(doc, text, true);
      else {
        const merged = await this.#merge(doc, text);
        if (!merged || doc.mergedWith !== null) {
          if (merged) doc.mergedWith = text;
          doc.theirs.value = { etag, text };
          return false;
        }
      }
    }
    this.#settled(doc);
    doc.etag = etag;
    doc.saved = text;
    if (doc.queued.value !== null) doc.queued.value = doc.text; // as it was, it would undo theirs
    this.#dirtied(doc);
    return true;
  }

  /** Takes in a document's texts one after another: of two at once, the later would be merged twice. */
  #inTurn<Result>(doc: Doc, take: () => Promise<Result>): Promise<Result> {
    const turn = doc.turn.then(take);
    doc.turn = turn.catch(() => {});
    return turn;
  }

  async #merge(doc: Doc, text: string): Promise<boolean> {
    const code = await this.#editor();
    for (;;) {
      const { state } = doc;
      if (state === null) return false;
      const spec = await code.merging(state, doc.base, text);
      if (spec === null) return false;
      if (doc.state?.doc !== state.doc) continue; // somebody typed meanwhile
      this.#apply(doc, spec);
      return true;
    }
  }

  /** Takes over a merge that was made by hand; the user still has to choose what is saved. */
  merged(doc: Doc, text: string): void {
    if (text !== doc.text) this.#replace(doc, text);
    doc.mergedWith = doc.theirs.value?.text ?? doc.mergedWith;
  }

  /** Ends a conflict: this text replaces what the others wrote. */
  async settle(doc: Doc, text: string): Promise<boolean> {
    const theirs = doc.theirs.value;
    if (theirs === null) return false;
    if (text !== doc.text) this.#replace(doc, text);
    if (text === theirs.text && theirs.etag !== null) return this.#saved(doc, text, theirs.etag);
    if (theirs.text !== null) doc.saved = theirs.text; // what they write from now on is merged with that
    doc.etag = theirs.etag;
    doc.gone.value = theirs.etag === null;
    this.#settled(doc);
    this.#dirtied(doc);
    return await this.#write(doc, text, theirs.etag, true);
  }

  /**
   * Changes documents and saves them, with what else is unsaved in them, or none of them: if one cannot be saved, the
   * earlier ones are put back, and the open documents stay as they are. Throws the reason.
   */
  async saveTogether(changes: ReadonlyMap<Doc, TransactionSpec>): Promise<void> {
    const saves = [...changes].map(([doc, spec]) => {
      const state = doc.state!;
      return { doc, spec, state, text: state.update(spec).state.sliceDoc(), etag: "" };
    });
    if (this.#readOnly()) throw new Error("This token may not write files.");
    const refuse = (doc: Doc, why: string) => new Error(`${doc.path} ${why} Nothing was changed.`);
    for (const { doc } of saves) {
      if (doc.theirs.value !== null) throw refuse(doc, "was changed by others, and nobody has chosen yet.");
      if (doc.gone.value) throw refuse(doc, "was deleted.");
      if (doc.saving.value || doc.queued.value !== null) throw refuse(doc, "is being saved. Try again.");
    }
    const { files } = this.#tenant();
    for (const { doc } of saves) doc.saving.value = true;
    try {
      await Promise.all(
        saves.map(async ({ doc }) => {
          const present = await files.stat(doc.path).catch((error: Error) => {
            throw refuse(doc, `cannot be saved: ${error.message}.`);
          });
          if (present.etag !== doc.etag) throw refuse(doc, "has changed meanwhile. Try again.");
        }),
      );
      for (const [at, save] of saves.entries()) {
        const { doc, text } = save;
        const written = await files
          .write(doc.path, text, { ifMatch: doc.etag! })
          .catch((error: Error) => error);
        if (written instanceof Error) {
          const left = await this.#putBack(saves.slice(0, at));
          const unknown = written instanceof Disconnected ? " It may have changed all the same." : "";
          const why = `cannot be saved: ${written.message}.${unknown}`;
          if (left.length === 0 && unknown === "") throw refuse(doc, why);
          const others = left.length > 0 ? ` Changed, and not put back: ${left.join(", ")}.` : "";
          throw new Error(`${doc.path} ${why}${others}`);
        }
        save.etag = written.etag;
      }
      for (const { doc, spec, state, text, etag } of saves) {
        if (doc.state?.doc === state.doc) {
          this.#apply(doc, spec);
          this.#saved(doc, text, etag);
        } else {
          // somebody typed meanwhile
          doc.saved = state.sliceDoc();
          this.#dirtied(doc);
          await this.#inTurn(doc, () => this.#arrived(doc, text, etag));
        }
      }
    } finally {
      for (const { doc } of saves) {
        doc.saving.value = false;
        void this.#flush(doc);
        if (doc.told) void this.#look(doc);
      }
    }
  }

  /** Writes the earlier texts back; returns the files where that failed because others changed them. */
  async #putBack(saves: readonly { readonly doc: Doc; readonly etag: string }[]): Promise<readonly string[]> {
    const left: string[] = [];
    for (const { doc, etag } of saves) {
      try {
        doc.etag = (await this.#tenant().files.write(doc.path, doc.saved, { ifMatch: etag })).etag;
      } catch {
        left.push(doc.path);
      }
    }
    return left;
  }

  async saveAll(): Promise<void> {
    for (const doc of this.tabs.open.value) if (doc.dirty.value) await this.save(doc);
  }

  /** Takes what the watcher saw, and looks at the open files that it may concern. */
  changed({ changes, overflow }: FileChanges): void {
    for (const doc of this.tabs.open.value) {
      // a folder that is created or removed stands for all that is in it
      const told = changes.some(({ path, change }) =>
        change === "changed" ? path === doc.path : within(doc.path, path),
      );
      if (overflow || told) void this.#look(doc);
    }
  }

  async #look(doc: Doc): Promise<void> {
    // a file that is renamed here is not removed
    await Promise.allSettled(this.#moving);
    if (doc.phase.value === "loading") return;
    doc.told = doc.saving.value;
    if (doc.told) return; // once that is over
    if (doc.phase.value !== "ready") {
      await this.load(doc);
      return;
    }
    const { path, etag: known } = doc;
    try {
      const { etag } = await this.#tenant().files.stat(path);
      if (etag === doc.etag) return;
      const present = await this.#tenant().files.read(path);
      const late = await this.#inTurn(doc, async () => {
        if (doc.path !== path || doc.phase.value !== "ready") return false;
        if (doc.saving.value || doc.etag !== known) return true; // the text that was read is outdated
        if (present.etag === doc.etag || present.text === undefined) return false;
        doc.size.value = present.size;
        await this.#arrived(doc, present.text, present.etag);
        return false;
      });
      if (late) await this.#look(doc);
    } catch (error) {
      if (!(error instanceof GatewayError) || error.code !== "not_found" || doc.saving.value) return;
      if (doc.path !== path) return this.#look(doc);
      doc.gone.value = true;
      this.#dirtied(doc);
    }
  }

  /** Puts another text into the document, by the smallest change; `mark` shows where. */
  #replace(doc: Doc, text: string, mark = false): void {
    if (this.#code === null || doc.state === null) return;
    this.#apply(doc, this.#code.replacing(doc.state, text, mark));
  }

  #apply(doc: Doc, spec: TransactionSpec): void {
    const stage = [...this.stages].find((one) => one.doc === doc);
    if (stage !== undefined) stage.dispatch(spec);
    else if (doc.state !== null) doc.state = doc.state.update(spec).state;
    this.#dirtied(doc);
  }

  /** Lets open files follow a file or folder that `work` moves. */
  move(from: string, to: string, work: Promise<unknown>): Promise<void> {
    return this.#afterwards(work.then(() => this.#moved(from, to)));
  }

  /** Closes the open files at `path` once `work` has removed it; their unsaved text is lost. */
  remove(path: string, work: Promise<unknown>): Promise<void> {
    const closed = work.then(() => {
      for (const doc of this.tabs.open.value) if (within(doc.path, path)) this.close(doc);
    });
    return this.#afterwards(closed);
  }

  /** Delays the watcher's changes until a move or removal is done. */
  async #afterwards(moved: Promise<void>): Promise<void> {
    this.#moving.add(moved);
    try {
      await moved;
    } finally {
      this.#moving.delete(moved);
    }
  }

  #moved(from: string, to: string): void {
    for (const doc of this.tabs.open.value) {
      if (!within(doc.path, from)) continue;
      this.#keeping?.drop(doc.path);
      doc.path = to + doc.path.slice(from.length);
      if (doc.dirty.value) this.#dirtied(doc);
      void this.#rename(doc);
    }
    void this.#keeping?.flush();
    this.tabs.open.value = [...this.tabs.open.value];
  }

  async #rename(doc: Doc): Promise<void> {
    if (this.#code === null || doc.state === null) return;
    this.#apply(doc, await this.#code.renaming(doc.path, doc.state.doc.length));
  }

  /** Notes who wrote a file. */
  written(path: string, by: string): void {
    const doc = this.tabs.find(path);
    if (doc !== undefined) doc.writtenBy.value = by;
  }

  /** Closes a tab; its unsaved text is lost. */
  close(doc: Doc): void {
    if (!this.tabs.open.value.includes(doc)) return;
    if (doc.image.value !== null) URL.revokeObjectURL(doc.image.value);
    this.tabs.remove(doc);
    if (doc.dirty.value) this.#keeping?.drop(doc.path);
  }
}
