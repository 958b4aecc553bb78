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
  type ChangeSpec,
  Compartment,
  EditorState,
  type Extension,
  RangeSet,
  StateEffect,
  StateField,
  type Text,
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
  GutterMarker,
  gutter,
  highlightActiveLine,
  highlightActiveLineGutter,
  highlightSpecialChars,
  keymap,
  lineNumbers,
  rectangularSelection,
  runScopeHandlers,
} from "@codemirror/view";
import { load } from "../state/network.js";
import { findPanel } from "./find.js";
import { supportOf } from "./languages.js";
import { nonce, theme } from "./theme.js";

export { supportOf };

interface Range {
  readonly from: number;
  readonly to: number;
}

const arrive = StateEffect.define<readonly Range[]>();
const arrived = Decoration.line({ class: "cm-arrived" });
/** How many lines are marked at most. */
const MARKED = 500;

/** Returns where the lines of some ranges begin, in order. */
function linesOf(doc: Text, ranges: readonly Range[]): readonly number[] {
  const lines = new Set<number>();
  for (const { from, to } of ranges) {
    const last = doc.lineAt(to).number;
    for (let line = doc.lineAt(from).number; line <= last && lines.size < MARKED; line++) lines.add(line);
  }
  return [...lines].map((line) => doc.line(line).from).sort((a, b) => a - b);
}

/** Marks the lines that came from outside, until the next edit. */
const arrivals = StateField.define<DecorationSet>({
  create: () => Decoration.none,
  update(marks, transaction) {
    for (const effect of transaction.effects) {
      if (!effect.is(arrive)) continue;
      const starts = linesOf(transaction.state.doc, effect.value);
      return Decoration.set(starts.map((start) => arrived.range(start)));
    }
    return transaction.docChanged ? Decoration.none : marks;
  },
  provide: (field) => EditorView.decorations.from(field),
});

class Theirs extends GutterMarker {
  override elementClass = "cm-theirs";
}

const theirs = new Theirs();

/** Marks in the gutter which lines others wrote since the file was opened. */
const written = StateField.define<RangeSet<GutterMarker>>({
  create: () => RangeSet.empty,
  update(marks, transaction) {
    let next = marks.map(transaction.changes);
    for (const effect of transaction.effects) {
      if (!effect.is(arrive)) continue;
      const starts = linesOf(transaction.state.doc, effect.value);
      const fresh = new Set(starts);
      next = next.update({
        filter: (from) => !fresh.has(from),
        add: starts.map((start) => theirs.range(start)),
      });
    }
    return next;
  },
});

const theirsGutter = gutter({ class: "cm-theirs-gutter", markers: (view) => view.state.field(written) });

const language = new Compartment();
const label = new Compartment();
const listening = new Compartment();
const liking = new Compartment();
const keying = new Compartment();
const servers = new Compartment();

function base(readOnly: boolean): Extension {
  return [
    lineNumbers(),
    [written, theirsGutter],
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
    search({ top: true, createPanel: findPanel }),
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

/** Names a text for screen readers, and makes it reachable by Tab even if it is read-only. */
function named(path: string): Extension {
  return EditorView.contentAttributes.of({ "aria-label": path, tabindex: "0" });
}

async function support(path: string, length: number): Promise<Extension> {
  return length > 2_000_000 ? [] : await supportOf(path);
}

/** Returns what makes a state that of a file with another name: its language, and what a screen reader calls it. */
export async function renaming(path: string, length: number): Promise<TransactionSpec> {
  const found = await support(path, length);
  return { effects: [language.reconfigure(found), label.reconfigure(named(path))] };
}

export async function makeState(text: string, path: string, readOnly: boolean): Promise<EditorState> {
  return EditorState.create({
    doc: text,
    extensions: [
      EditorState.lineSeparator.of(separator(text)),
      indentUnit.of(indentation(text)),
      keying.of([]), // before the others, which it overrules
      base(readOnly),
      servers.of([]),
      language.of(await support(path, text.length)),
      listening.of([]),
      liking.of([]),
      label.of(named(path)),
    ],
  });
}

/** Returns changes that come from outside; `marked` lines are shown for a moment. They are not ours to undo. */
function outside(changes: ChangeSpec, marked: readonly Range[]): TransactionSpec {
  return {
    changes,
    effects: marked.length > 0 ? arrive.of(marked) : [],
    annotations: [
      Transaction.remote.of(true),
      Transaction.userEvent.of("input.remote"),
      Transaction.addToHistory.of(false),
    ],
  };
}

/**
 * Returns what brings `theirs` into a state that was `base` before it was changed here; null where both changed the
 * same lines.
 */
export async function merging(
  state: EditorState,
  base: string,
  theirs: string,
): Promise<TransactionSpec | null> {
  const { incoming } = await load(() => import("./merging.js"));
  const changes = incoming(state.toText(base), state.doc, state.toText(theirs));
  if (changes === null) return null;
  const marked: Range[] = [];
  changes.iterChangedRanges((_from, _to, from, to) => marked.push({ from, to }));
  return outside(changes, marked);
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
  const changes = {
    from,
    to: present.length - tail,
    insert: state.toText(insert.replaceAll("\n", state.lineBreak)),
  };
  return mark ? outside(changes, [{ from, to: from + insert.length }]) : { changes };
}

/** Makes the one view in which documents are shown by turns. */
export function makeView(host: HTMLElement): EditorView {
  return new EditorView({
    parent: host,
    state: EditorState.create({ extensions: [theme, EditorView.cspNonce.of(nonce())] }),
  });
}

/** Presses a key in the text; returns false if nothing handles it. */
export function press(view: EditorView, key: string): boolean {
  return runScopeHandlers(view, new KeyboardEvent("keydown", { key, code: key }), "editor");
}

/** The user's settings for all files. */
export interface Likes {
  readonly wrap: boolean;
  readonly tabWidth: number;
  readonly keys: Extension;
}

/** Applies the user's settings to a view. */
export function like(view: EditorView, { wrap, tabWidth, keys }: Likes): void {
  const liked = [EditorState.tabSize.of(tabWidth), wrap ? EditorView.lineWrapping : []];
  view.dispatch({ effects: [liking.reconfigure(liked), keying.reconfigure(keys)] });
}

/** Returns what gives a state the help of a language server. */
export function serve(extension: Extension): TransactionSpec {
  return { effects: servers.reconfigure(extension) };
}

/** Returns what a state has of a language server. */
export function serving(state: EditorState): Extension {
  return servers.get(state) ?? [];
}

/** Shows a state, and calls `update` with each later one. */
export function showState(view: EditorView, state: EditorState, update: (state: EditorState) => void): void {
  view.setState(state);
  view.dispatch({
    effects: listening.reconfigure(EditorView.updateListener.of((change) => update(change.state))),
  });
}

export function goTo(view: EditorView, line: number, column = 1): void {
  const { doc } = view.state;
  const found = doc.line(Math.max(1, Math.min(line, doc.lines)));
  goBack(view, Math.min(found.to, found.from + column - 1));
}

/** Selects what was selected when the file was left; it may be shorter now. */
export function goBack(view: EditorView, anchor: number, head = anchor): void {
  const { length } = view.state.doc;
  const selection = { anchor: Math.min(anchor, length), head: Math.min(head, length) };
  view.dispatch({ selection, effects: EditorView.scrollIntoView(selection.head, { y: "center" }) });
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
