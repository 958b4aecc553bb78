import type { Tenant } from "@incus-gateway/client";
import { describe, expect, test } from "vitest";
import { FileIndex } from "../src/editor/state/file-index.js";
import { score } from "../src/editor/state/fuzzy.js";
import { replaced, replaceIn } from "../src/editor/state/replace.js";
import { Shelf } from "./tenant.js";

/** Returns the paths in the order in which the palette shows them. */
function ranked(query: string, ...paths: string[]): readonly string[] {
  return paths.filter((path) => score(path, query) > 0).sort((a, b) => score(b, query) - score(a, query));
}

describe("a file is found", () => {
  test("by folder and name typed as one word", () => {
    expect(ranked("uibutt", "src/build/units/butter.ts", "src/components/ui/button.tsx")[0]).toBe(
      "src/components/ui/button.tsx",
    );
  });
  test("by its name before its folder", () => {
    expect(ranked("app", "app/api/page.tsx", "src/app.tsx")[0]).toBe("src/app.tsx");
  });
  test("by characters that stand apart, in their order only", () => {
    expect(score("vite.config.ts", "vcts")).toBeGreaterThan(0);
    expect(score("vite.config.ts", "stv")).toBe(0);
  });
});

test("the index leaves out what is installed, at any depth, and is made anew when files come", async () => {
  const tree: Record<string, string[]> = {
    ".": ["src/", "node_modules/", "package.json"],
    src: ["src/a.ts", "src/node_modules/"],
    node_modules: ["node_modules/a.ts"],
    "src/node_modules": ["src/node_modules/a.ts"],
  };
  let asked = 0;
  const files = {
    list: async (folder: string) => {
      asked += 1;
      const entries = tree[folder]?.map((path) => ({
        path: path.replace(/\/$/, ""),
        type: path.endsWith("/") ? "directory" : "file",
      }));
      return { entries };
    },
  };
  const index = new FileIndex(() => ({ files }) as unknown as Tenant);
  expect(await index.find("a.ts")).toEqual(["src/a.ts"]);
  index.changed({ changes: [{ path: "src/a.ts", change: "changed" }], overflow: false });
  await index.find("a.ts");
  expect(asked).toBe(2);
  tree.src?.push("src/aa.ts");
  index.changed({ changes: [{ path: "src/aa.ts", change: "created" }], overflow: false });
  expect(await index.find("a.ts")).toContain("src/aa.ts");
});

describe("replacing in files", () => {
  test.each([
    ["a.b", false, false, "a.b axb A.B", "$1", "$1 axb $1", 2],
    ["a(.)b", true, false, "a.b axb", "<$1>", "<.> <x>", 2],
    ["a", false, true, "aAa", "", "A", 2],
    ["^x", true, true, "x\nx", "y", "y\ny", 2],
    ["none", false, false, "text", "y", "text", 0],
  ])("of %j (pattern: %j, case: %j)", (query, regex, matchCase, text, by, after, places) => {
    expect(replaced(text, { query, regex, matchCase }, by)).toEqual({ text: after, places });
  });

  test("leaves a file alone that somebody writes meanwhile", async () => {
    const shelf = new Shelf({ "a.txt": "old old", "b.txt": "old" });
    const { tenant } = shelf;
    const { read } = tenant.files;
    tenant.files.read = async (path: string) => {
      const content = await read(path);
      if (path === "b.txt") shelf.put("b.txt", "old, and theirs");
      return content;
    };
    const wanted = { query: "old", regex: false, matchCase: true };
    const done = await replaceIn(tenant, ["a.txt", "b.txt", "gone.txt"], wanted, "new");
    expect([done.files, done.places]).toEqual([1, 2]);
    expect(done.failed.map(({ path }) => path)).toEqual(["b.txt", "gone.txt"]);
    expect(shelf.text("a.txt")).toBe("new new");
    expect(shelf.text("b.txt")).toBe("old, and theirs");
  });
});
