import { Disconnected } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { render } from "preact";
import { act } from "preact/test-utils";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { Documents } from "../src/editor/state/documents.js";
import { toasts } from "../src/editor/state/toasts.js";
import type { Workspace } from "../src/editor/state/workspace.js";
import { Removing } from "../src/editor/ui/explorer.js";
import { Shelf } from "./tenant.js";

let documents: Documents;
let host: HTMLElement;
const remove = vi.fn<(path: string) => Promise<void>>();

async function asked(path: string, { state = "open", turns = 1 } = {}): Promise<string> {
  const current = {
    documents,
    status: signal({ state }),
    tenant: { history: { list: async () => ({ turns: Array(turns).fill({}), more: false }) } },
    tree: { rows: signal([]), remove },
  } as unknown as Workspace;
  await act(() => render(<Removing path={path} current={current} />, host));
  await act(async () => {});
  return host.querySelector("dialog")!.textContent!;
}

const button = () =>
  [...host.querySelectorAll("button")].find(({ textContent }) => textContent === "Delete")!;

beforeEach(async () => {
  const shelf = new Shelf({ "public/index.html": "<p>", "public/a.css": "p {}" });
  documents = new Documents(
    () => shelf.tenant,
    () => false,
  );
  remove.mockReset();
  host = document.body.appendChild(document.createElement("div"));
  await documents.show("public/a.css");
  const doc = await documents.show("public/index.html");
  documents.updated(doc, doc.state!.update({ changes: { from: 3, insert: "mine" } }).state);
});

afterEach(() => {
  render(null, host);
  host.remove();
});

test("who deletes is told what is unsaved, and what History has", async () => {
  const told = await asked("public");
  expect(told).toContain("index.html has unsaved changes, which are not in History.");
  expect(told).toContain("History keeps the text that it recorded last");
  expect(told).not.toContain("a.css");
  expect(await asked("public/a.css")).not.toContain("unsaved");
});

test("nothing is promised of a History that is off", async () => {
  expect(await asked("public", { turns: 0 })).toContain("Only a snapshot can bring it back.");
});

test("unsaved text stays open until the file is gone", async () => {
  await asked("public");
  remove.mockRejectedValueOnce(new Disconnected("the connection broke"));
  await act(() => button().click());
  await vi.waitFor(() => expect(toasts.value.at(-1)?.text).toBe("Deleting public: the connection broke"));
  expect(documents.tabs.open.value).toHaveLength(2);
  await asked("public");
  remove.mockResolvedValueOnce();
  await act(() => button().click());
  await vi.waitFor(() => expect(documents.tabs.open.value).toHaveLength(0));
});

test("without the gateway nothing is deleted, neither now nor later", async () => {
  expect(await asked("public", { state: "reconnecting" })).toContain("cannot be reached now");
  await act(() => button().click());
  expect(remove).not.toHaveBeenCalled();
});
