import { EditorView } from "@codemirror/view";
import { render } from "preact";
import { act } from "preact/test-utils";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import type { Doc } from "../src/editor/state/doc.js";
import { Documents } from "../src/editor/state/documents.js";
import { toasts } from "../src/editor/state/toasts.js";
import type { Workspace } from "../src/editor/state/workspace.js";
import { Conflict } from "../src/editor/ui/conflict.js";
import { Shelf } from "./tenant.js";

/** Milliseconds for a busy machine. */
const PATIENCE = 20_000;
const TEXT = "one\ntwo\nthree\nfour\nfive\n";

let shelf: Shelf;
let documents: Documents;
let doc: Doc;
let host: HTMLElement;

/** As the app does, which shows the dialog while there is something to compare. */
function App({ current }: { current: Workspace }) {
  const shown = current.documents.comparing.value;
  return shown === null ? null : <Conflict current={current} doc={shown} />;
}

/** Resolves once the dialog has closed and cleaned up, which Preact does after the next frame. */
const closed = (right: EditorView) => vi.waitFor(() => expect(right.dom.parentNode).toBeNull(), PATIENCE);

/** The agent writes: line two as we do, and one more line. */
async function agent(...changes: readonly (readonly [string, string])[]): Promise<void> {
  const text = changes.reduce((old, [from, to]) => old.replace(from, to), shelf.text("a.css")!);
  shelf.put("a.css", text);
  documents.changed({ changes: [{ path: "a.css", change: "changed" }], overflow: false });
  await vi.waitFor(() => expect(doc.theirs.value?.text ?? doc.saved).toBe(text));
  await act(async () => {});
}

/** Opens the dialog, and returns its right side. */
async function compared(): Promise<EditorView> {
  await act(() => {
    documents.comparing.value = doc;
  });
  return await vi.waitFor(() => {
    const side = host.querySelectorAll<HTMLElement>(".cm-editor")[1];
    expect(side).toBeDefined();
    expect(button("Save mine").disabled).toBe(false);
    return EditorView.findFromDOM(side!)!;
  }, PATIENCE);
}

function button(name: string): HTMLButtonElement {
  return [...host.querySelectorAll("button")].find(({ textContent }) => textContent === name)!;
}

function write(view: EditorView, find: string, insert: string): void {
  const from = view.state.doc.toString().indexOf(find);
  view.dispatch({ changes: { from, to: from + find.length, insert }, userEvent: "input.type" });
}

beforeEach(async () => {
  shelf = new Shelf({ "a.css": TEXT });
  documents = new Documents(
    () => shelf.tenant,
    () => false,
  );
  host = document.body.appendChild(document.createElement("div"));
  doc = await documents.show("a.css");
  documents.updated(doc, doc.state!.update({ changes: { from: 4, to: 7, insert: "mine" } }).state);
  render(<App current={{ documents } as Workspace} />, host);
  await agent(["two", "theirs"], ["four", "four of theirs"]);
});

afterEach(() => {
  render(null, host);
  host.remove();
});

test("Save mine keeps the other lines of the agent", async () => {
  const right = await compared();
  expect(right.state.doc.toString()).toBe("one\nmine\nthree\nfour of theirs\nfive\n");
  button("Save mine").click();
  await vi.waitFor(() => expect(shelf.text("a.css")).toBe("one\nmine\nthree\nfour of theirs\nfive\n"));
  await vi.waitFor(() => expect(doc.dirty.value).toBe(false));
  expect(documents.comparing.value).toBeNull();
});

test("what was merged by hand outlives the agent's next edits, Esc, and a click outside", async () => {
  let right = await compared();
  write(right, "mine", "both of us");
  await agent(["five", "five of theirs"], ["two", "again"]);
  const both = "one\nboth of us\nthree\nfour of theirs\nfive of theirs\n";
  await vi.waitFor(() => expect(right.state.doc.toString()).toBe(both));
  const dialog = host.querySelector("dialog")!;
  await act(() => void dialog.dispatchEvent(new Event("cancel", { cancelable: true })));
  expect(host.querySelector("dialog")).toBeNull();
  expect(doc.text).toBe(both);
  expect(doc.theirs.value).not.toBeNull(); // nobody has chosen
  await agent(["one", "one of theirs"]);
  expect(await documents.save(doc, false)).toBe(false);
  expect(documents.comparing.value).toBeNull(); // nobody asked: no dialog over who types
  expect(toasts.value.at(-1)?.text).toBe("a.css is not saved: others changed the same lines.");
  right = await compared();
  write(right, "three", "3");
  await act(() => void host.querySelector("dialog")!.dispatchEvent(new MouseEvent("mousedown")));
  right = await compared();
  const merged = "one of theirs\nboth of us\n3\nfour of theirs\nfive of theirs\n";
  expect(right.state.doc.toString()).toBe(merged);
  button("Save mine").click();
  await vi.waitFor(() => expect(shelf.text("a.css")).toBe(merged));
});

test("what was merged is kept where the agent takes its change back while one merges", async () => {
  const right = await compared();
  write(right, "mine", "both of us");
  await agent(["theirs", "two"], ["four of theirs", "four"]);
  await closed(right);
  expect(doc.text).toBe("one\nboth of us\nthree\nfour\nfive\n");
  expect(doc.theirs.value).toBeNull();
});

test("a dialog that was only looked at changes nothing", async () => {
  await compared();
  await act(
    () => void host.querySelector("dialog")!.dispatchEvent(new Event("cancel", { cancelable: true })),
  );
  expect([doc.text, doc.mergedWith]).toEqual([TEXT.replace("two", "mine"), null]);
});

test("what a person left out of theirs does not come back with their next edit", async () => {
  write(await compared(), "four of theirs", "four");
  await act(
    () => void host.querySelector("dialog")!.dispatchEvent(new Event("cancel", { cancelable: true })),
  );
  await agent(["one", "one of theirs"]);
  expect(doc.text).toBe("one of theirs\nmine\nthree\nfour\nfive\n");
});

test("Take theirs takes theirs, whatever was merged", async () => {
  const right = await compared();
  write(right, "mine", "both of us");
  button("Take theirs").click();
  await closed(right);
  expect(doc.text).toBe("one\ntheirs\nthree\nfour of theirs\nfive\n");
  expect(doc.dirty.value).toBe(false);
});
