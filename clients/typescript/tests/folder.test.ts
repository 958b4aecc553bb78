/** What of a folder is sent to be deployed; Python's client and the command line have the same table. */

import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { expect, test } from "vitest";
import { packed } from "../src/folder.js";

interface Folder {
  why: string;
  files: Record<string, string>;
  sent: string[];
}
const { folders } = JSON.parse(
  readFileSync(new URL("../../../tests/wire/ignored.json", import.meta.url), "utf8"),
) as { folders: Folder[] };

test.each(folders)("of a folder is sent what no ignore file names: $why", async ({ files, sent }) => {
  const folder = mkdtempSync(join(tmpdir(), "packed-"));
  try {
    for (const [name, text] of Object.entries(files)) {
      mkdirSync(dirname(join(folder, name)), { recursive: true });
      writeFileSync(join(folder, name), text);
    }
    const listed = execFileSync("tar", ["-tzf", "-"], { input: await packed(folder), encoding: "utf8" });
    const names = listed.split("\n").filter((name) => name !== "" && !name.endsWith("/"));
    expect(names.map((name) => name.replace(/^\.\//, "")).sort()).toEqual([...sent].sort());
  } finally {
    rmSync(folder, { recursive: true });
  }
});
