/** The merge view: their version, read-only, and mine with the changes of theirs that merge, to edit. */

import { defaultKeymap, history, historyKeymap } from "@codemirror/commands";
import { MergeView } from "@codemirror/merge";
import { EditorState, Transaction } from "@codemirror/state";
import { EditorView, keymap, lineNumbers } from "@codemirror/view";
import { supportOf } from "./languages.js";
import { incoming } from "./merging.js";
import { nonce, theme } from "./theme.js";

export interface Comparison {
  /** The right side, as it is now. */
  mine(): string;
  /** Whether a person changed it. */
  edited(): boolean;
  /** Shows their present text, null if they deleted it, and merges it: where both changed the same lines, mine stay. */
  follow(theirs: string | null): void;
  destroy(): void;
}

/** Starts with the common base; `follow` adds their text. */
export async function compare(
  host: HTMLElement,
  path: string,
  base: string,
  mine: string,
): Promise<Comparison> {
  let edited = false;
  const support = await supportOf(path);
  const lineBreak = mine.includes("\r\n") ? "\r\n" : "\n";
  const common = [
    lineNumbers(),
    theme,
    support,
    EditorState.lineSeparator.of(lineBreak),
    EditorView.cspNonce.of(nonce()),
    EditorView.lineWrapping,
  ];
  const view = new MergeView({
    parent: host,
    a: {
      doc: base,
      extensions: [
        ...common,
        EditorState.readOnly.of(true),
        EditorView.editable.of(false),
        EditorView.contentAttributes.of({ "aria-label": "Theirs, as the file is now", tabindex: "0" }),
      ],
    },
    b: {
      doc: mine,
      extensions: [
        ...common,
        history(),
        EditorView.updateListener.of(({ transactions }) => {
          edited ||= transactions.some((one) => one.docChanged && !one.annotation(Transaction.remote));
        }),
        keymap.of([...defaultKeymap, ...historyKeymap]),
        EditorView.contentAttributes.of({ "aria-label": "Mine, to be saved", tabindex: "0" }),
      ],
    },
    revertControls: "a-to-b",
    renderRevertControl: taking,
    gutter: true,
    collapseUnchanged: { margin: 3, minSize: 6 },
  });
  let before = view.a.state.doc;
  return {
    mine: () => view.b.state.sliceDoc(),
    edited: () => edited,
    follow(theirs) {
      const { state } = view.a;
      const text = state.toText(theirs ?? "");
      const changes = theirs === null ? null : incoming(before, view.b.state.doc, text, true);
      if (theirs !== null) before = text;
      view.a.dispatch({ changes: { from: 0, to: state.doc.length, insert: text } });
      if (changes === null || changes.empty) return;
      view.b.dispatch({
        changes,
        annotations: [Transaction.remote.of(true), Transaction.addToHistory.of(false)],
      });
    },
    destroy: () => view.destroy(),
  };
}

/** Makes the button between the sides that takes a part of theirs over. */
function taking(): HTMLElement {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "take";
  button.title = "Take this part of theirs";
  button.setAttribute("aria-label", button.title);
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawn.setAttribute("viewBox", "0 0 24 24");
  for (const d of ["M5 12h14", "m12 5 7 7-7 7"]) {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("d", d);
    drawn.append(line);
  }
  button.append(drawn);
  return button;
}
