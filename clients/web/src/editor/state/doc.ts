/** One open file: its text as it is here, and what is known of it as it is in the tenant. */

import type { EditorState } from "@codemirror/state";
import { signal } from "@preact/signals";
import { basename } from "./paths.js";

export type Phase = "loading" | "ready" | "image" | "binary" | "failed";

/** What is in the way of saving: the file as it is now, `text` null where it is gone. */
export interface Theirs {
  readonly etag: string | null;
  readonly text: string | null;
}

/** A place in a file, from 1. */
export interface Place {
  readonly line: number;
  readonly column?: number;
}

/** A file as a page left it. */
export interface Left {
  readonly path: string;
  readonly anchor: number;
  readonly head: number;
}

export class Doc {
  readonly phase = signal<Phase>("loading");
  readonly failure = signal("");
  readonly dirty = signal(false);
  readonly saving = signal(false);
  /** A text that is to be saved as soon as the gateway takes it. */
  readonly queued = signal<string | null>(null);
  /** Somebody else changed the file while we have unsaved changes. */
  readonly theirs = signal<Theirs | null>(null);
  /** Their text at the last merge by hand: what ours lacks of it, the user left out on purpose. */
  mergedWith: string | null = null;
  /** The file is gone; saving creates it again. */
  readonly gone = signal(false);
  readonly image = signal<string | null>(null);
  readonly size = signal(0);
  /** It is looked at as a page or picture instead of its text. */
  readonly looking = signal(false);
  /** The file changed while it was being saved here: perhaps by others. */
  told = false;
  /** Ends with the last of the texts that are taken in. */
  turn: Promise<unknown> = Promise.resolve();
  state: EditorState | null = null;
  etag: string | null = null;
  saved = "";
  scroll: unknown = null;
  goTo: Place | Left | null = null;
  /** Whether its view takes the focus when it is shown next. */
  focuses = true;
  /** Who wrote the file last, if known, to be named above the text. */
  readonly writtenBy = signal<string | null>(null);

  constructor(public path: string) {}

  get name(): string {
    return basename(this.path);
  }

  /** The common base of ours and theirs. */
  get base(): string {
    return this.mergedWith ?? this.saved;
  }

  get text(): string {
    return this.state?.sliceDoc() ?? "";
  }

  /** How the file is left, for who comes back to it. */
  get left(): Left {
    if (this.goTo !== null && "path" in this.goTo) return { ...this.goTo, path: this.path }; // not shown since
    const { anchor = 0, head = 0 } = this.state?.selection.main ?? {};
    return { path: this.path, anchor, head };
  }
}
