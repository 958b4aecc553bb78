import { LSPClient } from "@codemirror/lsp-client";
import { EditorState } from "@codemirror/state";
import { Decoration, EditorView, showTooltip, WidgetType } from "@codemirror/view";
import { Disconnected } from "@incus-gateway/client";
import { beforeEach, describe, expect, test, vi } from "vitest";
import type * as lsp from "vscode-languageserver-protocol";
import { joined } from "../src/editor/servers/completion.js";
import { documentation, markdownOf, plain } from "../src/editor/servers/documentation.js";
import { applyEdit, changing, offset } from "../src/editor/servers/edits.js";
import { type Around, features } from "../src/editor/servers/features.js";
import { Frames, frame } from "../src/editor/servers/framing.js";
import { change, OpenFiles } from "../src/editor/servers/open-files.js";
import { servedBy } from "../src/editor/servers/served.js";
import { Documents } from "../src/editor/state/documents.js";
import { Shelf } from "./tenant.js";

const bytes = (text: string) => new TextEncoder().encode(text);

describe("frames", () => {
  test("are read however their bytes arrive", () => {
    const sent = ['{"a":"ä"}', "{}", `{"b":"${"x".repeat(5000)}"}`];
    const all = sent.flatMap((message) => [...frame(message)]);
    for (const size of [1, 2, 7, 100, all.length]) {
      const frames = new Frames();
      const found: string[] = [];
      for (let at = 0; at < all.length; at += size)
        found.push(...frames.push(Uint8Array.from(all.slice(at, at + size))));
      expect(found).toEqual(sent);
    }
  });

  test("may have other headers", () => {
    expect(new Frames().push(bytes("Content-Type: x\r\ncontent-length: 2\r\n\r\n{}"))).toEqual(["{}"]);
  });

  test.each([
    ["no length", "Content-Type: x\r\n\r\n{}"],
    ["a length that nothing could hold", "Content-Length: 999999999\r\n\r\n"],
    ["a header without end", "x".repeat(5000)],
  ])("with %s are refused", (_name, text) => {
    expect(() => new Frames().push(bytes(text))).toThrow("language server sent");
  });
});

test("what a server and the editor both complete is offered once, as the server does", () => {
  const list = (from: number, ...labels: string[]) => ({
    from,
    options: labels.map((label) => ({ label, detail: `${from}` })),
  });
  const server = { ...list(3, "color", "columns"), validFor: /^\w*$/ };
  const found = joined([server, list(3, "color", "for"), list(2, "@color"), list(3, "for")]);
  expect(found?.options.map(({ label }) => label)).toEqual(["color", "columns", "for"]);
  expect(found?.options[0]).toBe(server.options[0]);
  expect(found).toMatchObject({ from: 3, validFor: server.validFor });
  expect(joined([])).toBeNull();
});

test.each([
  ["src/app.tsx", { kind: "typescript", language: "typescriptreact" }],
  ["a.mjs", { kind: "typescript", language: "javascript" }],
  ["a.scss", { kind: "css", language: "scss" }],
  ["index.html", { kind: "html", language: "html" }],
  ["package.json", { kind: "json", language: "json" }],
  ["tsconfig.app.json", { kind: "json", language: "jsonc" }],
  ["README.md", null],
  ["Makefile", null],
])("%s is served by %j", (path, expected) => {
  expect(servedBy(path)).toEqual(expected);
});

describe("what a server says", () => {
  test.each([
    ["<img src=x onerror=alert(1)>", ""],
    ["a<script>alert(1)</script>b", "aalert(1)b"],
    ["<<b>script>", "script>"],
    ["1 < 2", "1 &lt; 2"],
    ["<img src=x ", "&lt;img src=x "],
  ])("of a signature, %j, has no tag", (html, expected) => {
    expect(String(plain(html))).toBe(expected);
  });

  test("is Markdown of which HTML is not shown, nor an image loaded, nor a script linked to", async () => {
    const hostile = "**bold** <img src=x onerror=alert(1)>\n\n<form action=//evil></form>\n\n";
    const shown = documentation(`${hostile}![x](https://evil/x.png) [y](javascript:alert(1))`);
    await vi.waitFor(() => expect(shown.textContent).not.toBe(""));
    expect(shown.querySelector("img, form, script, a")).toBeNull();
    expect(shown.querySelector("strong")?.textContent).toBe("bold");
  });

  test("of a hover is taken in all its forms", () => {
    const code = { language: "css", value: "a {}" };
    expect(markdownOf(["one", code])).toBe("one\n\n```css\na {}\n```");
    expect(markdownOf({ kind: "plaintext", value: "<b>" })).toBe("```\n<b>\n```");
  });

  test("of places that do not exist stays within the text", () => {
    const { doc } = EditorState.create({ doc: "one\ntwo" });
    const at = (line: number, character: number) => offset(doc, { line, character });
    expect([at(0, 2), at(1, 99), at(99, 0), at(-1, 0), at(0, -5), at(Number.NaN, 1)]).toEqual([
      2, 7, 7, 0, 0, 0,
    ]);
  });

  test("has the line breaks of the file it changes", () => {
    const state = EditorState.create({ doc: "a\r\nb", extensions: EditorState.lineSeparator.of("\r\n") });
    const range = { start: { line: 1, character: 0 }, end: { line: 1, character: 1 } };
    const changed = state.update(changing(state, [{ range, newText: "c\nd" }], "format")).state;
    expect(changed.sliceDoc()).toBe("a\r\nc\r\nd");
  });
});

describe("open files", () => {
  let shelf: Shelf;
  let documents: Documents;
  let files: OpenFiles;
  let sent: { method: string; params: Record<string, unknown> }[];

  beforeEach(async () => {
    shelf = new Shelf({ "a.ts": "one()\n", "b.ts": "one()\n", "node_modules/c.ts": "one()\n" });
    documents = new Documents(
      () => shelf.tenant,
      () => false,
    );
    sent = [];
    let answer: (text: string) => void = () => {};
    const client = new LSPClient({ workspace: (client) => new OpenFiles(client, "/srv/my site") });
    client.connect({
      send: (text) => {
        const { id, method, params } = JSON.parse(text);
        sent.push({ method, params });
        const result = { capabilities: { textDocumentSync: 2 } };
        if (method === "initialize") answer(JSON.stringify({ jsonrpc: "2.0", id, result }));
      },
      subscribe: (handler) => {
        answer = handler;
      },
      unsubscribe: () => {},
    });
    await client.initializing;
    files = client.workspace as OpenFiles;
  });

  const edits = (...uris: string[]): lsp.WorkspaceEdit => {
    const range = { start: { line: 0, character: 0 }, end: { line: 0, character: 3 } };
    return { changes: Object.fromEntries(uris.map((uri) => [uri, [{ range, newText: "two" }]])) };
  };

  test("are told to the server by their names, and so is what changes in them unseen", async () => {
    const doc = await documents.show("a.ts");
    const file = files.add(doc, "typescript");
    expect(file.uri).toBe("file:///srv/my%20site/a.ts");
    expect(files.path(file.uri)).toBe("a.ts");
    change(documents, doc, { changes: { from: 0, to: 3, insert: "two" } });
    files.client.sync();
    await vi.waitFor(() => expect(sent.map(({ method }) => method)).toContain("textDocument/didChange"));
    expect(sent.at(-1)?.params.contentChanges).toEqual([{ text: "two()\n" }]);
    files.client.sync();
    expect(sent.filter(({ method }) => method === "textDocument/didChange")).toHaveLength(1);
  });

  const both = () => edits("file:///srv/my%20site/a.ts", "file:///srv/my%20site/b.ts");

  test("of an edit are opened, changed and saved, with what else is unsaved in them", async () => {
    const doc = await documents.show("a.ts");
    change(documents, doc, { changes: { from: 6, insert: "// mine\n" } });
    expect(await applyEdit(documents, files, both(), () => null)).toBe(2);
    expect(shelf.text("b.ts")).toBe("two()\n");
    expect(shelf.text("a.ts")).toBe("two()\n// mine\n");
    expect(doc.text).toBe("two()\n// mine\n");
    expect(doc.dirty.value).toBe(false);
    expect(documents.tabs.current.value).toBe(doc);
  });

  test("of an edit stay as they are, all of them, where one cannot be saved", async () => {
    const [a, b] = [await documents.show("a.ts"), await documents.show("b.ts")];
    change(documents, a, { changes: { from: 6, insert: "// mine\n" } });
    shelf.meanwhile.write = () => shelf.put("b.ts", "theirs\n"); // after a.ts is saved
    const failed = "b.ts cannot be saved: changed. Nothing was changed.";
    await expect(applyEdit(documents, files, both(), () => null)).rejects.toThrow(failed);
    expect([shelf.text("a.ts"), shelf.text("b.ts")]).toEqual(["one()\n", "theirs\n"]);
    expect([a.text, b.text, a.dirty.value]).toEqual(["one()\n// mine\n", "one()\n", true]);
    expect(await documents.save(a)).toBe(true); // by the etag that it has now
    expect(shelf.text("a.ts")).toBe("one()\n// mine\n");
  });

  test("of an edit are named where they could not be put back", async () => {
    shelf.meanwhile.write = () => {
      shelf.put("a.ts", "the agent's\n");
      shelf.put("b.ts", "theirs\n");
    };
    const failed = "b.ts cannot be saved: changed. Changed, and not put back: a.ts.";
    await expect(applyEdit(documents, files, both(), () => null)).rejects.toThrow(failed);
    expect(shelf.text("a.ts")).toBe("the agent's\n");
  });

  test("of an edit may be changed where the connection broke before the answer, which is said", async () => {
    shelf.meanwhile.write = () => Promise.reject(new Disconnected("the connection broke"));
    const failed = "a.ts cannot be saved: the connection broke. It may have changed all the same.";
    await expect(applyEdit(documents, files, both(), () => null)).rejects.toThrow(failed);
    expect([shelf.text("a.ts"), shelf.text("b.ts")]).toEqual(["two()\n", "one()\n"]);
  });

  test("of an edit keep what is typed while they are saved", async () => {
    const doc = await documents.show("a.ts");
    shelf.meanwhile.write = () => change(documents, doc, { changes: { from: 6, insert: "// mine\n" } });
    await applyEdit(documents, files, both(), () => null);
    expect(doc.text).toBe("two()\n// mine\n");
    expect(doc.dirty.value).toBe(true);
    expect(shelf.text("a.ts")).toBe("two()\n");
  });

  test.each(["theirs", "gone", "queued"] as const)(
    "are not changed where one of them is %s",
    async (state) => {
      const doc = await documents.show("b.ts");
      if (state === "theirs") doc.theirs.value = { etag: "e9", text: "theirs" };
      else if (state === "gone") doc.gone.value = true;
      else doc.queued.value = "mine";
      await expect(applyEdit(documents, files, both(), () => null)).rejects.toThrow(
        /^b.ts .* Nothing was changed/,
      );
      expect(shelf.text("a.ts")).toBe("one()\n");
    },
  );

  test.each([
    "file:///etc/passwd",
    "file:///srv/my%20site/../x.ts",
    "https://evil/a.ts",
    "untitled:a",
    "file:///srv/my%20site/node_modules/c.ts",
  ])("are not changed where an edit is about %s too", async (uri) => {
    const edit = edits("file:///srv/my%20site/b.ts", uri);
    await expect(applyEdit(documents, files, edit, () => null)).rejects.toThrow("outside");
    expect(shelf.text("b.ts")).toBe("one()\n");
    expect(documents.tabs.open.value).toHaveLength(0);
  });

  test("are not changed where one has changed since the server saw it", async () => {
    const doc = await documents.show("a.ts");
    const before = doc.state!.doc;
    change(documents, doc, { changes: { from: 0, insert: " " } });
    const edit = edits("file:///srv/my%20site/a.ts");
    await expect(applyEdit(documents, files, edit, () => before)).rejects.toThrow("changed meanwhile");
    expect(doc.text).toBe(" one()\n");
  });
});

test("a hover that was asked for in one file is not shown in another", async () => {
  let answer: (hover: object) => void = () => {};
  const client = {
    serverCapabilities: { hoverProvider: true },
    request: () => new Promise((resolve) => (answer = resolve)),
  } as unknown as LSPClient;
  const around = { client, used: () => {}, changed: () => {} } as unknown as Around;
  const extension = features(around);
  const icon = new (class extends WidgetType {
    toDOM() {
      return document.createElement("i");
    }
  })();
  const mark = EditorView.decorations.of(Decoration.set(Decoration.widget({ widget: icon }).range(50)));
  const view = new EditorView({
    parent: document.body,
    state: EditorState.create({ doc: "x".repeat(100), extensions: [extension, mark] }),
  });
  const tooltips = () => view.state.facet(showTooltip).filter((one) => one !== null);
  const hover = () =>
    view.dom.querySelector("i")!.dispatchEvent(new MouseEvent("mousemove", { bubbles: true }));
  vi.useFakeTimers();
  try {
    hover();
    await vi.advanceTimersByTimeAsync(400);
    answer({ contents: "of x" });
    await vi.advanceTimersByTimeAsync(0);
    expect(tooltips()).toHaveLength(1);
    view.dispatch({ changes: { from: 0, insert: "y" } });
    expect(tooltips()).toHaveLength(0);
    hover();
    await vi.advanceTimersByTimeAsync(400);
    view.setState(EditorState.create({ doc: "short", extensions: [extension] }));
    answer({ contents: "of x" });
    await vi.advanceTimersByTimeAsync(0);
    expect(tooltips()).toHaveLength(0);
  } finally {
    vi.useRealTimers();
    view.destroy();
  }
});
