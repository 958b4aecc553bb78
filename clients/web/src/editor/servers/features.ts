/** What a server adds to a file's view: completions, hover, going to a definition, renaming, signatures. */

import { nextDiagnostic, previousDiagnostic } from "@codemirror/lint";
import { type LSPClient, LSPPlugin, signatureHelp } from "@codemirror/lsp-client";
import { type Extension, Prec, type Text, Transaction } from "@codemirror/state";
import { EditorView, hoverTooltip, keymap, showDialog, type ViewUpdate } from "@codemirror/view";
import type * as lsp from "vscode-languageserver-protocol";
import type { Documents } from "../state/documents.js";
import { complain, say } from "../state/toasts.js";
import { completions } from "./completion.js";
import { documentation, markdownOf } from "./documentation.js";
import { applyEdit, offset, position } from "./edits.js";
import type { OpenFiles } from "./open-files.js";

export interface Around {
  readonly documents: Documents;
  readonly client: LSPClient;
  readonly files: OpenFiles;
  /** Called when a person uses it. */
  used(): void;
  /** Called when a text has changed. */
  changed(): void;
}

export function features(around: Around): Extension {
  const { used, changed } = around;
  return [
    completions(),
    hover(around),
    signatureHelp(),
    Prec.high(
      keymap.of([
        { key: "F12", run: (view) => define(around, view), preventDefault: true },
        { key: "F2", run: (view) => rename(around, view), preventDefault: true },
        { key: "F8", run: nextDiagnostic, shift: previousDiagnostic },
      ]),
    ),
    EditorView.domEventHandlers({
      mousedown: (event, view) => {
        const at = view.posAtCoords(event);
        if (event.button !== 0 || !(event.ctrlKey || event.metaKey) || event.altKey || at === null)
          return false;
        view.dispatch({ selection: { anchor: at } });
        return define(around, view);
      },
    }),
    EditorView.updateListener.of((update) => {
      if (update.docChanged) changed();
      if (byHand(update)) used();
    }),
  ];
}

/** Whether a person made the change; an agent's changes do not keep the server running. */
export function byHand(update: ViewUpdate): boolean {
  if (update.focusChanged) return update.view.hasFocus;
  if (!update.docChanged && !update.selectionSet) return false;
  return update.transactions.some((one) => !one.annotation(Transaction.remote));
}

function asked(view: EditorView, at: number) {
  const plugin = LSPPlugin.get(view);
  plugin?.client.sync();
  return { textDocument: { uri: plugin?.uri ?? "" }, position: position(view.state.doc, at) };
}

function hover({ client, used }: Around): Extension {
  return hoverTooltip(
    async (view, at) => {
      if (!client.serverCapabilities?.hoverProvider) return null;
      used();
      const { doc } = view.state;
      const found = await client
        .request<object, lsp.Hover | null>("textDocument/hover", asked(view, at))
        .catch(() => null);
      const text = found == null ? "" : markdownOf(found.contents).trim();
      // CodeMirror drops an answer that a change outdates, but not one for another file
      if (text === "" || view.state.doc !== doc) return null;
      const range = found?.range;
      const pos = range === undefined ? at : Math.min(at, offset(doc, range.start));
      const end = range === undefined ? at : Math.max(at, offset(doc, range.end));
      return { pos, end, above: true, create: () => ({ dom: documentation(text) }) };
    },
    { hideOn: ({ docChanged }) => docChanged },
  );
}

/** Goes to the definition of the symbol at the cursor. */
function define({ client, documents, files, used }: Around, view: EditorView): boolean {
  if (!client.serverCapabilities?.definitionProvider) return false;
  used();
  const params = asked(view, view.state.selection.main.head);
  void (async () => {
    try {
      type Found = lsp.Location | lsp.LocationLink;
      const answer = await client.request<object, Found | Found[] | null>("textDocument/definition", params);
      const first = Array.isArray(answer) ? answer[0] : answer;
      if (first == null) return say("No definition was found.");
      const uri = "targetUri" in first ? first.targetUri : first.uri;
      const { start } = "targetUri" in first ? first.targetSelectionRange : first.range;
      const path = files.path(uri);
      if (path === null)
        return say("It is defined outside of the site's files, in the language itself or its server.");
      await documents.show(path, { line: start.line + 1, column: start.character + 1 });
    } catch (error) {
      complain(error, "Finding the definition");
    }
  })();
  return true;
}

/** Asks for a new name for the symbol at the cursor, and renames it in all files. */
function rename(around: Around, view: EditorView): boolean {
  const { state } = view;
  const word = state.wordAt(state.selection.main.head);
  if (word === null || !around.client.serverCapabilities?.renameProvider || state.readOnly) return false;
  around.used();
  const before = state.sliceDoc(word.from, word.to);
  const { close, result } = showDialog(view, {
    label: "New name",
    input: { name: "name", value: before, "aria-label": "New name", spellcheck: "false" },
    focus: true,
    submitLabel: "Rename",
    class: "rename-panel",
    top: true,
  });
  void result.then((form) => {
    view.dispatch({ effects: close });
    view.focus();
    const field = form?.elements.namedItem("name");
    const name = field instanceof HTMLInputElement ? field.value.trim() : "";
    if (name !== "" && name !== before) void renamed(around, asked(view, word.from), name);
  });
  return true;
}

async function renamed({ client, documents, files }: Around, params: object, newName: string): Promise<void> {
  const texts = new Map<string, Text>(files.files.map(({ uri, doc }) => [uri, doc]));
  try {
    const edit = await client.request<object, lsp.WorkspaceEdit | null>("textDocument/rename", {
      ...params,
      newName,
    });
    const known = (path: string) => texts.get(files.uri(path)) ?? null;
    const count = edit == null ? 0 : await applyEdit(documents, files, edit, ({ path }) => known(path));
    say(
      count === 0 ? "Nothing here can be renamed." : `Renamed in ${count} ${count === 1 ? "file" : "files"}.`,
    );
  } catch (error) {
    complain(error, "Renaming");
  }
}
