/** Completions by a language server, completed by the editor's own. Documentation is loaded when one is selected. */

import {
  autocompletion,
  type Completion,
  type CompletionContext,
  type CompletionResult,
  type CompletionSource,
  completeFromList,
  insertCompletionText,
  pickedCompletion,
  snippet,
} from "@codemirror/autocomplete";
import { LSPPlugin } from "@codemirror/lsp-client";
import type { EditorState, Extension } from "@codemirror/state";
import type { EditorView } from "@codemirror/view";
import type * as lsp from "vscode-languageserver-protocol";
import { documentation } from "./documentation.js";
import { changing, lines, offset } from "./edits.js";

/** Completions shown at most: nobody reads further, and the next letter asks again. */
const MOST = 1000;

const TYPES: readonly string[] = (
  " text method function class property variable class interface namespace property constant constant keyword " +
  "keyword constant text text text constant constant class property method type"
).split(" ");

export function completions(): Extension {
  return autocompletion({ override: [source] });
}

/** Asks the server, and adds what the editor itself knows of the language, such as snippets. */
async function source(context: CompletionContext): Promise<CompletionResult | null> {
  const own = context.state.languageDataAt<CompletionSource | Completion[]>("autocomplete", context.pos);
  const found = await Promise.all([
    ofServer(context),
    ...own.map((one) => (Array.isArray(one) ? completeFromList(one) : one)(context)),
  ]);
  return joined(found.filter((one) => one !== null));
}

/** Merges lists. If several contain the same completion, the first one's is taken. */
export function joined(results: readonly CompletionResult[]): CompletionResult | null {
  const [first, ...others] = results;
  if (first === undefined) return null;
  const options = [...first.options];
  const named = new Set(options.map(({ label }) => label));
  for (const one of others.filter(({ from }) => from === first.from).flatMap(({ options }) => options)) {
    if (!named.has(one.label)) options.push(one);
    named.add(one.label);
  }
  return { ...first, options };
}

async function ofServer(context: CompletionContext): Promise<CompletionResult | null> {
  const plugin = context.view === undefined ? null : LSPPlugin.get(context.view);
  const provider = plugin?.client.serverCapabilities?.completionProvider;
  if (plugin === null || provider == null) return null;
  const before = context.state.sliceDoc(context.pos - 1, context.pos);
  const triggers = (provider.triggerCharacters ?? []).filter((one) => one !== " ");
  const triggered = triggers.includes(before);
  if (!context.explicit && !triggered && !/[\w$]/.test(before)) return null;
  plugin.client.sync();
  const params = {
    textDocument: { uri: plugin.uri },
    position: plugin.toPosition(context.pos, context.state.doc),
    context: triggered ? { triggerKind: 2, triggerCharacter: before } : { triggerKind: 1 },
  };
  context.addEventListener("abort", () => plugin.client.cancelRequest(params));
  const answer = await plugin.client
    .request<object, lsp.CompletionList | lsp.CompletionItem[] | null>("textDocument/completion", params)
    .catch(() => null);
  const list = Array.isArray(answer) ? { items: answer, isIncomplete: false } : answer;
  if (list == null || !Array.isArray(list.items)) return null;
  const { from, to } = range(context, list);
  const typed = context.state.sliceDoc(from, context.pos).toLowerCase();
  const items = list.items.length > MOST ? list.items.filter((item) => fits(item, typed)) : list.items;
  const cut = items.length > MOST || items.length < list.items.length;
  const options = items.slice(0, MOST).map((item) => option(plugin, context.state, list, item));
  const incomplete = list.isIncomplete || cut;
  return { from, to, options, ...(incomplete ? {} : { validFor: /^[\w$]*$/ }) };
}

function fits(item: lsp.CompletionItem, typed: string): boolean {
  return (item.filterText ?? item.label).toLowerCase().includes(typed);
}

/** Returns the range that a completion replaces. */
function range({ state, pos }: CompletionContext, list: lsp.CompletionList): { from: number; to: number } {
  const wide = list.itemDefaults?.editRange;
  const edit = list.items[0]?.textEdit;
  const said = wide ?? (edit === undefined ? undefined : "range" in edit ? edit.range : edit.insert);
  const found = said === undefined ? undefined : "insert" in said ? said.insert : said;
  if (found !== undefined) {
    const from = offset(state.doc, found.start);
    const to = offset(state.doc, found.end);
    if (from <= pos && to >= pos) return { from, to };
  }
  const word = /[\w$]*$/.exec(state.sliceDoc(state.doc.lineAt(pos).from, pos))![0];
  return { from: pos - word.length, to: pos };
}

function option(
  plugin: LSPPlugin,
  state: EditorState,
  list: lsp.CompletionList,
  item: lsp.CompletionItem,
): Completion {
  const text = lines(item.textEdit?.newText ?? item.textEditText ?? item.insertText ?? item.label, state);
  const insertFormat = item.insertTextFormat ?? list.itemDefaults?.insertTextFormat;
  const edits = item.additionalTextEdits ?? [];
  const apply = (view: EditorView, completion: Completion, from: number, to: number) => {
    if (insertFormat === 2) snippet(fields(text))(view, completion, from, to);
    else
      view.dispatch(insertCompletionText(view.state, text, from, to), {
        annotations: pickedCompletion.of(completion),
      });
    // the text before the cursor has not moved
    const first = edits.filter(({ range }) => offset(state.doc, range.end) <= from);
    if (first.length > 0) view.dispatch(changing(state, first, "input.complete"));
  };
  const type = TYPES[item.kind ?? 0];
  return {
    label: item.filterText ?? item.label,
    displayLabel: item.label,
    apply,
    info: () => told(plugin, item),
    ...(type ? { type } : {}),
    ...(item.detail === undefined ? {} : { detail: item.detail.slice(0, 120) }),
    ...(item.sortText === undefined ? {} : { sortText: item.sortText }),
  };
}

/** Turns a snippet of the protocol into CodeMirror's template. */
function fields(text: string): string {
  return text.replace(/\\([$}\\])|\$(\d+)/g, (_all, escaped, field) => escaped ?? `\${${field}}`);
}

/** Asks for details that are too large to send with every completion. */
async function told(plugin: LSPPlugin, item: lsp.CompletionItem): Promise<Node | null> {
  let { detail, documentation: text } = item;
  if (plugin.client.serverCapabilities?.completionProvider?.resolveProvider)
    ({ detail, documentation: text } = await plugin.client
      .request<lsp.CompletionItem, lsp.CompletionItem>("completionItem/resolve", item)
      .catch(() => item));
  const value = typeof text === "string" ? text : (text?.value ?? "");
  const code = detail === undefined ? "" : `\`\`\`\n${detail}\n\`\`\`\n`;
  return code === "" && value === "" ? null : documentation(code + value);
}
