/** The open files: their text, unsaved changes, and changes by others. */

import type { EditorState, TransactionSpec } from "@codemirror/state";
import { Disconnected, type FileChanges, GatewayError, type Tenant } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { basename, parent, within } from "./paths.js";
import { complain, say } from "./toasts.js";

type Code = typeof import("../code/editor.js");

export type Phase = "loading" | "ready" | "image" | "binary" | "failed";

/** What is in the way of saving: the file as it is now, `text` null where it is gone. */
export interface Theirs {
  readonly etag: string | null;
  readonly text: string | null;
}

export interface Place {
  readonly line: number;
  readonly column?: number;
}

const IMAGE = /\.(png|jpe?g|gif|webp|avif|ico|svg)$/i;

export class Doc {
  readonly phase = signal<Phase>("loading");
  readonly failure = signal("");
  readonly dirty = signal(false);
  readonly saving = signal(false);
  /** A text that is to be saved as soon as the gateway takes it. */
  readonly queued = signal<string | null>(null);
  /** Somebody else changed the file while we have unsaved changes. */
  readonly theirs = signal<Theirs | null>(null);
  /** The file is gone; saving creates it again. */
  readonly gone = signal(false);
  readonly image = signal<string | null>(null);
  readonly size = signal(0);
  state: EditorState | null = null;
  etag: string | null = null;
  saved = "";
  scroll: unknown = null;
  goTo: Place | null = null;

  constructor(public path: string) {}

  get name(): string {
    return basename(this.path);
  }

  get text(): string {
    return this.state?.sliceDoc() ?? "";
  }
}

/** The one view that shows a document's state, if it is there. */
export interface Stage {
  readonly doc: Doc | null;
  dispatch(spec: TransactionSpec): void;
}

export class Documents {
  readonly #tenant: () => Tenant;
  readonly #readOnly: () => boolean;
  #code: Code | null = null;
  readonly open = signal<readonly Doc[]>([]);
  readonly active = signal<Doc | null>(null);
  /** The document whose conflict is being looked at. */
  readonly comparing = signal<Doc | null>(null);
  stage: Stage | null = null;

  constructor(tenant: () => Tenant, readOnly: () => boolean) {
    this.#tenant = tenant;
    this.#readOnly = readOnly;
  }

  get dirty(): boolean {
    return this.open.value.some((doc) => doc.dirty.value);
  }

  /** How many texts wait to be saved. */
  get queued(): number {
    return this.open.value.filter((doc) => doc.queued.value !== null).length;
  }

  find(path: string): Doc | undefined {
    return this.open.value.find((doc) => doc.path === path);
  }

  /** Opens a file, or shows it where it is open. */
  async show(path: string, place?: Place): Promise<Doc> {
    let doc = this.find(path);
    if (doc === undefined) {
      doc = new Doc(path);
      const at = this.active.value === null ? -1 : this.open.value.indexOf(this.active.value);
      this.open.value = at < 0 ? [...this.open.value, doc] : this.open.value.toSpliced(at + 1, 0, doc);
      doc.goTo = place ?? null;
      this.active.value = doc;
      await this.load(doc);
    } else {
      doc.goTo = place ?? null;
      // a signal tells its listeners of other values only
      if (this.active.value === doc) this.active.value = null;
      this.active.value = doc;
    }
    return doc;
  }

  async load(doc: Doc): Promise<void> {
    try {
      if (IMAGE.test(doc.path) && !doc.path.endsWith(".svg")) {
        await this.#loadImage(doc);
        return;
      }
      const [content, code] = await Promise.all([this.#tenant().files.read(doc.path), this.#editor()]);
      doc.size.value = content.size;
      doc.etag = content.etag;
      if (content.text === undefined) {
        doc.phase.value = "binary";
        return;
      }
      doc.saved = content.text;
      doc.state = await code.makeState(content.text, doc.path, this.#readOnly());
      doc.dirty.value = false;
      doc.theirs.value = null;
      doc.gone.value = false;
      doc.phase.value = "ready";
    } catch (error) {
      doc.failure.value = error instanceof Error ? error.message : String(error);
      doc.phase.value = "failed";
    }
  }

  async #loadImage(doc: Doc): Promise<void> {
    const content = await this.#tenant().files.read(doc.path);
    const bytes = Uint8Array.from(atob(content.data ?? ""), (char) => char.charCodeAt(0));
    if (doc.image.value !== null) URL.revokeObjectURL(doc.image.value);
    const extension = doc.path.split(".").pop()?.toLowerCase() ?? "";
    const type = `image/${{ jpg: "jpeg", ico: "x-icon" }[extension] ?? extension}`;
    doc.image.value = URL.createObjectURL(new Blob([bytes], { type }));
    doc.size.value = content.size;
    doc.etag = content.etag;
    doc.phase.value = "image";
  }

  async #editor(): Promise<Code> {
    this.#code ??= await import("../code/editor.js");
    return this.#code;
  }

  /** Takes note of what was typed. */
  updated(doc: Doc, state: EditorState): void {
    const changed = doc.state?.doc !== state.doc;
    doc.state = state;
    if (changed) doc.dirty.value = doc.gone.value || state.sliceDoc() !== doc.saved;
  }

  /** Saves a document, unless somebody else wrote first: then that is shown. */
  async save(doc: Doc): Promise<boolean> {
    if (doc.phase.value !== "ready" || doc.state === null) return false;
    if (this.#readOnly()) {
      say("This token may not write files.", "error");
      return false;
    }
    if (doc.theirs.value !== null) {
      this.comparing.value = doc;
      return false;
    }
    if (doc.saving.value) {
      doc.queued.value = doc.text; // what is under way may be an older text
      return false;
    }
    doc.queued.value = null;
    return await this.#write(doc, doc.text, doc.gone.value ? null : doc.etag);
  }

  /** Saves what waited for the gateway. */
  flush(): void {
    for (const doc of this.open.value) void this.#flush(doc);
  }

  async #flush(doc: Doc): Promise<void> {
    const text = doc.queued.value;
    if (text === null || doc.saving.value) return;
    doc.queued.value = null;
    if (doc.theirs.value !== null) this.comparing.value = doc;
    else if (text !== doc.saved || doc.gone.value)
      await this.#write(doc, text, doc.gone.value ? null : doc.etag);
  }

  async #write(doc: Doc, text: string, etag: string | null): Promise<boolean> {
    doc.saving.value = true;
    let reached = true;
    try {
      const condition = etag === null ? ({ ifNoneMatch: "*" } as const) : { ifMatch: etag };
      const written = await this.#tenant().files.write(doc.path, text, { ...condition, createDirs: true });
      doc.size.value = written.size;
      return this.#saved(doc, text, written.etag);
    } catch (error) {
      const code = error instanceof GatewayError ? error.code : null;
      if (code === "conflict") {
        doc.queued.value = null;
        const theirs = await this.#theirs(doc).catch(() => null);
        if (theirs === null) {
          reached = false;
          doc.queued.value = text;
          return false;
        }
        // our own text, whose answer was lost
        if (theirs.text === text && theirs.etag !== null) return this.#saved(doc, text, theirs.etag);
        doc.theirs.value = theirs;
        this.comparing.value = doc;
      } else if (error instanceof Disconnected || code === "unauthorized") {
        reached = false;
        doc.queued.value ??= text;
        const when = code === "unauthorized" ? "you have signed in" : "the gateway can be reached again";
        say(`${doc.name} is saved as soon as ${when}.`);
      } else complain(error, `Saving ${doc.name}`);
      return false;
    } finally {
      doc.saving.value = false;
      if (reached) void this.#flush(doc);
    }
  }

  #saved(doc: Doc, text: string, etag: string): true {
    doc.etag = etag;
    doc.saved = text;
    doc.gone.value = false;
    doc.theirs.value = null;
    doc.dirty.value = doc.text !== text; // more may have been typed meanwhile
    return true;
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

  /** Ends a conflict by this text, which takes the place of what the others wrote. */
  async settle(doc: Doc, text: string): Promise<boolean> {
    const theirs = doc.theirs.value;
    if (theirs === null) return false;
    if (text !== doc.text) this.#replace(doc, text);
    if (text === theirs.text && theirs.etag !== null) {
      doc.etag = theirs.etag;
      doc.saved = text;
      doc.dirty.value = false;
      doc.theirs.value = null;
      return true;
    }
    return await this.#write(doc, text, theirs.etag);
  }

  async saveAll(): Promise<void> {
    for (const doc of this.open.value) if (doc.dirty.value) await this.save(doc);
  }

  /** Takes what the watcher saw, and looks at the open files that it may concern. */
  changed({ changes, overflow }: FileChanges): void {
    for (const doc of this.open.value) {
      // a folder that is created or removed stands for all that is in it
      const told = changes.some(({ path, change }) =>
        change === "changed" ? path === doc.path : within(doc.path, path),
      );
      if (overflow || told) void this.#look(doc);
    }
  }

  async #look(doc: Doc): Promise<void> {
    if (doc.saving.value || doc.phase.value === "loading") return;
    if (doc.phase.value !== "ready") {
      await this.load(doc);
      return;
    }
    try {
      const { etag } = await this.#tenant().files.stat(doc.path);
      if (etag === doc.etag || doc.saving.value) return;
      const present = await this.#tenant().files.read(doc.path);
      if (doc.saving.value || present.etag === doc.etag || present.text === undefined) return;
      doc.gone.value = false;
      if (present.text === doc.text) {
        doc.dirty.value = false;
      } else if (doc.dirty.value) {
        doc.theirs.value = { etag: present.etag, text: present.text };
        return;
      } else {
        doc.saved = present.text;
        this.#replace(doc, present.text, true);
      }
      doc.theirs.value = null;
      doc.etag = present.etag;
      doc.saved = present.text;
      doc.size.value = present.size;
    } catch (error) {
      if (error instanceof GatewayError && error.code === "not_found") {
        doc.gone.value = true;
        doc.dirty.value = true;
      }
    }
  }

  /** Puts another text into the document, by the smallest change; `mark` shows where. */
  #replace(doc: Doc, text: string, mark = false): void {
    if (this.#code === null || doc.state === null) return;
    const spec = this.#code.replacing(doc.state, text, mark);
    if (this.stage?.doc === doc) this.stage.dispatch(spec);
    else doc.state = doc.state.update(spec).state;
    doc.dirty.value = doc.text !== doc.saved;
  }

  moved(from: string, to: string): void {
    for (const doc of this.open.value) {
      if (within(doc.path, from)) doc.path = to + doc.path.slice(from.length);
    }
    this.open.value = [...this.open.value];
  }

  /** Closes a tab; its unsaved text is lost. */
  close(doc: Doc): void {
    const at = this.open.value.indexOf(doc);
    if (at < 0) return;
    if (doc.image.value !== null) URL.revokeObjectURL(doc.image.value);
    this.open.value = this.open.value.toSpliced(at, 1);
    if (this.active.value === doc)
      this.active.value = this.open.value[Math.min(at, this.open.value.length - 1)] ?? null;
  }

  step(by: number): void {
    const { value: open } = this.open;
    if (open.length === 0) return;
    const at = this.active.value === null ? 0 : open.indexOf(this.active.value);
    this.active.value = open[(at + by + open.length) % open.length] ?? null;
  }

  folder(): string {
    return this.active.value === null ? "." : parent(this.active.value.path);
  }
}
