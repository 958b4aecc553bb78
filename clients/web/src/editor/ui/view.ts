/** The view in which one writes, and where in it. */

import type { EditorView } from "@codemirror/view";
import { signal } from "@preact/signals";
import type { Caret } from "../code/editor.js";

export const caret = signal<Caret | null>(null);
/** The view, for commands that act on it. */
export const view: { current: EditorView | null } = { current: null };
