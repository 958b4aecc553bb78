import { beforeEach, describe, expect, test, vi } from "vitest";
import type { Doc } from "../src/editor/state/doc.js";
import { Documents } from "../src/editor/state/documents.js";
import { Drafts } from "../src/editor/state/drafts.js";
import { Shelf } from "./tenant.js";

const TEXT = "one\ntwo\nthree\nfour\nfive\n";

let shelf: Shelf;
let documents: Documents;

beforeEach(() => {
  shelf = new Shelf({ "a.css": TEXT });
  documents = new Documents(
    () => shelf.tenant,
    () => false,
  );
});

/** Types as a person does. */
function type(doc: Doc, find: string, insert: string): void {
  const from = doc.text.indexOf(find);
  documents.updated(doc, doc.state!.update({ changes: { from, to: from + find.length, insert } }).state);
}

function seen(path: string, change: "changed" | "removed" | "created" = "changed"): void {
  documents.changed({ changes: [{ path, change }], overflow: false });
}

describe("what others write", () => {
  test("arrives in a text with unsaved changes elsewhere, and both are saved", async () => {
    const doc = await documents.show("a.css");
    type(doc, "two", "two, as I say");
    shelf.put("a.css", TEXT.replace("four", "four, as the agent says"));
    seen("a.css");
    await vi.waitFor(() => expect(doc.text).toContain("as the agent says"));
    expect(doc.text).toBe("one\ntwo, as I say\nthree\nfour, as the agent says\nfive\n");
    expect(doc.dirty.value).toBe(true);
    expect(doc.theirs.value).toBeNull();
    expect(await documents.save(doc)).toBe(true);
    expect(shelf.text("a.css")).toBe(doc.text);
  });

  test("arrives too where the save is what finds it", async () => {
    const doc = await documents.show("a.css");
    type(doc, "two", "2");
    shelf.put("a.css", TEXT.replace("five", "5"));
    expect(await documents.save(doc)).toBe(true);
    expect(shelf.text("a.css")).toBe("one\n2\nthree\nfour\n5\n");
    expect(doc.dirty.value).toBe(false);
  });

  test("of the same line is a conflict, which overwrites nothing", async () => {
    const doc = await documents.show("a.css");
    type(doc, "two", "mine");
    shelf.put("a.css", TEXT.replace("two", "theirs"));
    expect(await documents.save(doc)).toBe(false);
    expect(documents.comparing.value).toBe(doc);
    expect(shelf.text("a.css")).toContain("theirs");
    expect(doc.text).toContain("mine");
  });

  test("is no conflict where the text is the same", async () => {
    const doc = await documents.show("a.css");
    type(doc, "two", "2");
    shelf.put("a.css", TEXT); // touched, or renamed back and forth
    seen("a.css");
    expect(await documents.save(doc)).toBe(true);
    expect(documents.comparing.value).toBeNull();
  });

  test("arrives though it was told while one's own words were being saved", async () => {
    const doc = await documents.show("a.css");
    type(doc, "two", "2");
    shelf.meanwhile.write = () => {
      shelf.put("a.css", doc.text.replace("five", "5"));
      seen("a.css");
      return Promise.resolve();
    };
    expect(await documents.save(doc)).toBe(true);
    await vi.waitFor(() => expect(doc.text).toBe("one\n2\nthree\nfour\n5\n"));
    expect(doc.dirty.value).toBe(false);
  });

  test("does not come back where one has saved over it before it was read", async () => {
    const doc = await documents.show("a.css");
    shelf.put("a.css", TEXT.replace("five", "5"));
    const saved = new Promise<void>((resolve) => {
      shelf.meanwhile.read = async () => {
        type(doc, "two", "2");
        await documents.save(doc);
        resolve();
      };
    });
    seen("a.css");
    await saved;
    await new Promise((resolve) => setTimeout(resolve)); // what was read has had its turn
    expect(doc.text).toBe("one\n2\nthree\nfour\n5\n");
    expect(shelf.text("a.css")).toBe(doc.text);
    expect(doc.dirty.value).toBe(false);
  });

  test("is not undone with one's own words", async () => {
    const { undo } = await import("@codemirror/commands");
    const doc = await documents.show("a.css");
    type(doc, "two", "2");
    shelf.put("a.css", TEXT.replace("five", "5"));
    seen("a.css");
    await vi.waitFor(() => expect(doc.text).toContain("5"));
    undo({ state: doc.state!, dispatch: (transaction) => documents.updated(doc, transaction.state) });
    expect(doc.text).toBe(TEXT.replace("five", "5"));
    expect(doc.dirty.value).toBe(false);
  });
});

describe("a rename", () => {
  test("keeps an open file, though its old name is told to be removed first", async () => {
    const doc = await documents.show("a.css");
    type(doc, "two", "2");
    let answer = () => {};
    const answered = new Promise<void>((resolve) => {
      answer = resolve;
    });
    const moving = documents.move(
      "a.css",
      "b.md",
      shelf.tenant.files.move("a.css", "b.md").then(() => answered),
    );
    expect(shelf.text("a.css")).toBeUndefined();
    seen("a.css", "removed"); // the watcher is faster than the answer
    await new Promise((resolve) => setTimeout(resolve)); // what it sets off has had its turn
    expect(doc.gone.value).toBe(false);
    answer();
    await moving;
    seen("b.md", "created");
    await vi.waitFor(() => expect(documents.tabs.find("b.md")).toBe(doc));
    expect(doc.gone.value).toBe(false);
    expect(await documents.save(doc)).toBe(true);
    expect(documents.comparing.value).toBeNull();
    expect(shelf.text("b.md")).toBe(TEXT.replace("two", "2"));
    const { language } = await import("@codemirror/language");
    await vi.waitFor(() => expect(doc.state!.facet(language)?.name).toBe("markdown"));
  });

  test("by somebody else leaves a text that can be saved", async () => {
    const doc = await documents.show("a.css");
    shelf.delete("a.css");
    seen("a.css", "removed");
    await vi.waitFor(() => expect(doc.gone.value).toBe(true));
    expect(await documents.save(doc)).toBe(true);
    expect(shelf.text("a.css")).toBe(TEXT);
  });
});

describe("unsaved text", () => {
  let drafts: Drafts;
  /** The page after this one. */
  const reload = async () => {
    await drafts.flush();
    drafts = new Drafts("shop", () => "ann");
    documents = new Documents(
      () => shelf.tenant,
      () => false,
      drafts,
    );
    return documents.restore([], null, await drafts.take());
  };
  beforeEach(() => {
    drafts = new Drafts("shop", () => "ann");
    documents = new Documents(
      () => shelf.tenant,
      () => false,
      drafts,
    );
    return async () => {
      for (const doc of documents.tabs.open.value) documents.close(doc);
      await drafts.flush();
    };
  });

  test("comes back, and is nowhere once it is saved", async () => {
    type(await documents.show("a.css"), "two", "unsaved");
    expect(drafts.atRisk).toBe(true);
    expect(await reload()).toBe(1);
    const doc = documents.tabs.find("a.css")!;
    expect(doc.text).toContain("unsaved");
    expect(doc.dirty.value).toBe(true);
    expect(await documents.save(doc)).toBe(true);
    expect(await reload()).toBe(0);
  });

  test("takes in what was written meanwhile, or shows the conflict", async () => {
    type(await documents.show("a.css"), "two", "unsaved");
    await drafts.flush();
    shelf.put("a.css", TEXT.replace("five", "5"));
    await reload();
    expect(documents.tabs.find("a.css")!.text).toBe("one\nunsaved\nthree\nfour\n5\n");
    await drafts.flush();
    shelf.put("a.css", TEXT.replace("two", "theirs"));
    await reload();
    const doc = documents.tabs.find("a.css")!;
    expect(doc.theirs.value?.text).toContain("theirs");
    expect(doc.text).toContain("unsaved");
  });

  test("of a file that is gone comes back too", async () => {
    type(await documents.show("a.css"), "two", "unsaved");
    await drafts.flush();
    shelf.delete("a.css");
    await reload();
    const doc = documents.tabs.find("a.css")!;
    expect(doc.gone.value).toBe(true);
    expect(await documents.save(doc)).toBe(true);
    expect(shelf.text("a.css")).toContain("unsaved");
  });

  test("is no other person's and no other tenant's", async () => {
    type(await documents.show("a.css"), "two", "secret");
    await drafts.flush();
    expect(await new Drafts("shop", () => "bob").take()).toEqual([]);
    expect(await new Drafts("blog", () => "ann").take()).toEqual([]);
    expect(await new Drafts("shop", () => "ann").take()).toHaveLength(1);
  });

  test("that is closed does not come back", async () => {
    const doc = await documents.show("a.css");
    type(doc, "two", "discarded");
    await drafts.flush();
    documents.close(doc);
    expect(await reload()).toBe(0);
  });

  test("that is too long to be kept is asked about before the page is left", async () => {
    const doc = await documents.show("a.css");
    type(doc, "two", "x".repeat(5 << 20));
    await drafts.flush();
    expect(drafts.atRisk).toBe(true);
    type(doc, "x".repeat(5 << 20), "short");
    await drafts.flush();
    expect(drafts.atRisk).toBe(false);
  });
});

describe("a file beside another", () => {
  beforeEach(async () => {
    shelf.put("b.css", "b");
    await documents.show("a.css");
    await documents.show("b.css");
    documents.tabs.split(documents.tabs.find("b.css")!);
  });
  const shown = () => [
    documents.tabs.active.value?.path,
    documents.tabs.beside.value?.path,
    documents.tabs.current.value?.path,
  ];

  test("leaves the one before in its place, and is what commands are about", () => {
    expect(shown()).toEqual(["a.css", "b.css", "b.css"]);
  });

  test("is never in both places", async () => {
    await documents.show("b.css");
    expect(shown()).toEqual(["a.css", "b.css", "b.css"]);
    await documents.show("a.css");
    expect(shown()).toEqual(["a.css", "b.css", "a.css"]);
    documents.tabs.step(1);
    expect(shown()).toEqual(["a.css", "b.css", "b.css"]);
  });

  test("is moved to the others and back", () => {
    const { tabs } = documents;
    tabs.place(tabs.find("b.css")!, "main");
    expect(shown()).toEqual(["b.css", undefined, "b.css"]);
    tabs.place(tabs.find("a.css")!, "beside");
    expect(shown()).toEqual(["b.css", "a.css", "a.css"]);
    tabs.place(tabs.find("b.css")!, "beside");
    expect(shown()).toEqual(["a.css", "b.css", "b.css"]);
  });

  test.each(["a.css", "b.css"])("ends when %s is closed, and the other stays", (path) => {
    documents.close(documents.tabs.find(path)!);
    const other = path === "a.css" ? "b.css" : "a.css";
    expect(shown()).toEqual([other, undefined, other]);
  });

  test("of one file alone is that file alone", () => {
    documents.close(documents.tabs.find("a.css")!);
    documents.tabs.split(documents.tabs.find("b.css")!);
    expect(documents.tabs.current.value?.path).toBe("b.css");
    documents.tabs.join();
    expect(shown()).toEqual(["b.css", undefined, "b.css"]);
  });
});

describe("a file that an agent wrote is followed", () => {
  const stage = (focused: boolean) =>
    documents.stages.add({ doc: null, pane: "main", focused, dispatch: () => {} });
  const open = async () => {
    for (const path of ["mine.ts", "a.ts", "b.ts"]) shelf.put(path, path);
    return await documents.show("mine.ts");
  };

  test("at once, without the focus, where nobody types in the text", async () => {
    await open();
    dispatchEvent(new KeyboardEvent("keydown", { key: "t" })); // in a terminal, or a field
    stage(false);
    await documents.follow("a.ts", () => true);
    expect(documents.tabs.active.value?.path).toBe("a.ts");
    expect(documents.tabs.active.value?.focuses).toBe(false);
  });

  test("after who types has come to rest, the last one alone", async () => {
    const mine = await open();
    stage(true);
    vi.useFakeTimers({ toFake: ["setTimeout", "performance"] });
    try {
      const press = () => dispatchEvent(new KeyboardEvent("keydown", { key: "t" }));
      press();
      const following = [documents.follow("a.ts", () => true), documents.follow("b.ts", () => true)];
      await vi.advanceTimersByTimeAsync(4000);
      press();
      await vi.advanceTimersByTimeAsync(4000);
      expect(documents.tabs.active.value).toBe(mine);
      expect(documents.tabs.find("b.ts")?.phase.value).toBe("ready"); // its tab is there
      await vi.advanceTimersByTimeAsync(1000);
      expect(documents.tabs.active.value?.path).toBe("b.ts");
      await vi.advanceTimersByTimeAsync(5000);
      await Promise.all(following);
      expect(documents.tabs.active.value?.path).toBe("b.ts");
    } finally {
      vi.useRealTimers();
    }
  });

  test("never while a word is composed, nor beside what one types, nor if it is no longer wanted", async () => {
    const mine = await open();
    stage(true);
    let wanted = true;
    vi.useFakeTimers({ toFake: ["setTimeout", "performance"] });
    try {
      dispatchEvent(new CompositionEvent("compositionstart"));
      const following = documents.follow("a.ts", () => wanted);
      await vi.advanceTimersByTimeAsync(60_000);
      expect(documents.tabs.active.value).toBe(mine);
      dispatchEvent(new CompositionEvent("compositionend"));
      wanted = false;
      await vi.advanceTimersByTimeAsync(60_000);
      await following;
      expect(documents.tabs.active.value).toBe(mine);
    } finally {
      vi.useRealTimers();
    }
    documents.tabs.place(mine, "beside");
    documents.stages.clear();
    await documents.follow("mine.ts", () => true);
    await documents.follow("a.ts", () => true);
    expect(documents.tabs.current.value).toBe(mine); // Ctrl-S saves what is typed
  });
});

test("lines that are added beside a changed one are merged, also where they end alike", async () => {
  shelf.put("b.css", "a { x }\nb { y }\n");
  const doc = await documents.show("b.css");
  type(doc, "b { y }", "b { mine }");
  shelf.put("b.css", "a { x }\nb { y }\nc { z }\n");
  seen("b.css");
  await vi.waitFor(() => expect(doc.text).toBe("a { x }\nb { mine }\nc { z }\n"));
  expect(doc.theirs.value).toBeNull();
});
