/** Builds CodeMirror states for documents and applies texts from outside to them. */

import {
  autocompletion,
  closeBrackets,
  closeBracketsKeymap,
  completionKeymap,
} from "@codemirror/autocomplete";
import { defaultKeymap, history, historyKeymap, indentWithTab } from "@codemirror/commands";
import {
  bracketMatching,
  codeFolding,
  foldGutter,
  foldKeymap,
  getIndentUnit,
  indentOnInput,
  indentUnit,
} from "@codemirror/language";
import { highlightSelectionMatches, search, searchKeymap } from "@codemirror/search";
import {
  Compartment,
  EditorState,
  type Extension,
  StateEffect,
  StateField,
  Transaction,
  type TransactionSpec,
} from "@codemirror/state";
import {
  crosshairCursor,
  Decoration,
  type DecorationSet,
  drawSelection,
  dropCursor,
  EditorView,
  highlightActiveLine,
  highlightActiveLineGutter,
  highlightSpecialChars,
  keymap,
  lineNumbers,
  rectangularSelection,
} from "@codemirror/view";
import { languageOf } from "./languages.js";
import { nonce, theme } from "./theme.js";

const arrive = StateEffect.define<{ from: number; to: number } | null>();
const arrived = Decoration.line({ class: "cm-arrived" });

/** Marks the lines that came from outside, until the next edit. */
const arrivals = StateField.define<DecorationSet>({
  create: () => Decoration.none,
  update(marks, transaction) {
    for (const effect of transaction.effects) {
      if (!effect.is(arrive) || effect.value === null) continue;
      const { doc } = transaction.state;
      const first = doc.lineAt(effect.value.from).number;
      const last = doc.lineAt(effect.value.to).number;
      const lines = Array.from({ length: Math.min(last - first + 1, 500) }, (_, index) =>
        arrived.range(doc.line(first + index).from),
      );
      return Decoration.set(lines);
    }
    return transaction.docChanged ? Decoration.none : marks;
  },
  provide: (field) => EditorView.decorations.from(field),
});

const language = new Compartment();
const listening = new Compartment();

function base(readOnly: boolean): Extension {
  return [
    lineNumbers(),
    highlightActiveLineGutter(),
    highlightSpecialChars(),
    history(),
    foldGutter({ openText: "⌄", closedText: "›" }),
    codeFolding(),
    drawSelection(),
    dropCursor(),
    EditorState.allowMultipleSelections.of(true),
    indentOnInput(),
    bracketMatching(),
    closeBrackets(),
    autocompletion(),
    rectangularSelection(),
    crosshairCursor(),
    highlightActiveLine(),
    highlightSelectionMatches(),
    search({ top: true }),
    arrivals,
    theme,
    EditorView.cspNonce.of(nonce()),
    EditorView.domEventHandlers({ beforeinput: replaced }),
    keymap.of([
      ...closeBracketsKeymap,
      ...defaultKeymap,
      ...searchKeymap,
      ...historyKeymap,
      ...foldKeymap,
      ...completionKeymap,
      indentWithTab,
    ]),
    readOnly ? [EditorState.readOnly.of(true), EditorView.editable.of(false)] : [],
  ];
}

/**
 * Types over lines that are selected. Left to the browser it would join them itself, with inline styles that the
 * page's content security policy reports.
 */
function replaced(event: InputEvent, view: EditorView): boolean {
  const { from, to } = view.state.selection.main;
  const text = event.data;
  if (event.inputType !== "insertText" || text === null || !event.cancelable || view.composing) return false;
  const single = view.state.selection.ranges.length === 1 && !text.includes("\n");
  if (view.state.readOnly || (single && view.state.doc.lineAt(from).to >= to)) return false;
  event.preventDefault();
  const insert = () =>
    view.state.update(view.state.replaceSelection(view.state.toText(text)), {
      userEvent: "input.type",
      scrollIntoView: true,
    });
  if (view.state.facet(EditorView.inputHandler).some((take) => take(view, from, to, text, insert)))
    return true;
  view.dispatch(insert());
  return true;
}

/** Returns the line separator with which a text comes back byte by byte. */
function separator(text: string): string {
  if (!text.includes("\r")) return "\n";
  return /\r(?!\n)|(?<!\r)\n/.test(text) ? "\n" : "\r\n";
}

/** Returns the indentation that a text uses: that of its first indented line. */
function indentation(text: string): string {
  const found = /^(\t| {2,8})\S/m.exec(text.slice(0, 20_000));
  return found?.[1] ?? "  ";
}

export async function makeState(text: string, path: string, readOnly: boolean): Promise<EditorState> {
  const known = text.length > 2_000_000 ? null : languageOf(path);
  const support = known === null ? [] : await known.load().catch(() => []);
  return EditorState.create({
    doc: text,
    extensions: [
      EditorState.lineSeparator.of(separator(text)),
      indentUnit.of(indentation(text)),
      base(readOnly),
      language.of(support),
      listening.of([]),
      EditorView.contentAttributes.of({ "aria-label": path }),
    ],
  });
}

/** Returns the smallest single change that makes `text` of a state; `mark` shows its lines for a moment. */
export function replacing(state: EditorState, text: string, mark: boolean): TransactionSpec {
  // positions count a line break as one, however long the separator is
  const wanted = state.toText(text).toString();
  const present = state.doc.toString();
  let from = 0;
  const most = Math.min(wanted.length, present.length);
  while (from < most && wanted[from] === present[from]) from++;
  let tail = 0;
  while (tail < most - from && wanted[wanted.length - 1 - tail] === present[present.length - 1 - tail])
    tail++;
  const insert = wanted.slice(from, wanted.length - tail);
  return {
    changes: {
      from,
      to: present.length - tail,
      insert: state.toText(insert.replaceAll("\n", state.lineBreak)),
    },
    effects: mark ? arrive.of({ from, to: from + insert.length }) : [],
    annotations: [Transaction.remote.of(true), Transaction.userEvent.of("input.remote")],
  };
}

/** Makes the one view in which documents are shown by turns. */
export function makeView(host: HTMLElement): EditorView {
  return new EditorView({
    parent: host,
    state: EditorState.create({ extensions: [theme, EditorView.cspNonce.of(nonce())] }),
  });
}

/** Shows a state; `update` is told of all that happens to it from then on. */
export function showState(view: EditorView, state: EditorState, update: (state: EditorState) => void): void {
  view.setState(state);
  view.dispatch({
    effects: listening.reconfigure(EditorView.updateListener.of((change) => update(change.state))),
  });
}

export function goTo(view: EditorView, line: number, column = 1): void {
  const { doc } = view.state;
  const found = doc.line(Math.max(1, Math.min(line, doc.lines)));
  const at = Math.min(found.to, found.from + column - 1);
  view.dispatch({ selection: { anchor: at }, effects: EditorView.scrollIntoView(at, { y: "center" }) });
}

export interface Caret {
  readonly line: number;
  readonly column: number;
  readonly selected: number;
  readonly indent: string;
  readonly lineEnd: string;
}

export function caretOf(state: EditorState): Caret {
  const { main } = state.selection;
  const line = state.doc.lineAt(main.head);
  const width = getIndentUnit(state);
  const tabs = state.facet(indentUnit).startsWith("\t");
  return {
    line: line.number,
    column: main.head - line.from + 1,
    selected: main.to - main.from,
    indent: tabs ? "Tabs" : `${width} spaces`,
    lineEnd: state.lineBreak === "\r\n" ? "CRLF" : "LF",
  };
}
