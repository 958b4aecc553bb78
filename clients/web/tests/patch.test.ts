import { expect, test } from "vitest";
import { readPatch } from "../src/editor/state/patch.js";

const PATCH = `diff --git a/src/app.tsx b/src/app.tsx
index 1..2 100644
--- a/src/app.tsx
+++ b/src/app.tsx
@@ -1,4 +1,4 @@
 one
--- two
+++ two
 three
 four
@@ -20 +20,2 @@ function f() {
 twenty
+diff --git a/not b/not
\\ No newline at end of file
diff --git a/gone.txt b/gone.txt
deleted file mode 100644
--- a/gone.txt
+++ /dev/null
@@ -1 +0,0 @@
-bye
diff --git "a/gr\\303\\274n.md" "b/gr\\303\\274n.md"
new file mode 100644
--- /dev/null
+++ "b/gr\\303\\274n.md"
@@ -0,0 +1 @@
+hello
diff --git a/logo.png b/logo.png
Binary files a/logo.png and b/logo.png differ
`;

test("a patch is read by its counts, whatever its lines look like", () => {
  const files = readPatch(PATCH);
  expect(files.map(({ path, note }) => [path, note])).toEqual([
    ["src/app.tsx", null],
    ["gone.txt", "deleted"],
    ["grün.md", "new file"],
    ["logo.png", "binary"],
  ]);
  const [app] = files;
  expect(app?.hunks.map(({ heading }) => heading)).toEqual(["", "function f() {"]);
  expect(app?.hunks[0]?.lines).toContainEqual({ kind: "removed", before: 2, after: null, text: "-- two" });
  expect(app?.hunks[0]?.lines).toContainEqual({ kind: "added", before: null, after: 2, text: "++ two" });
  expect(app?.hunks[1]?.lines.map(({ kind, after }) => [kind, after])).toEqual([
    ["same", 20],
    ["added", 21],
    ["note", null],
  ]);
});

test("a patch that is cut off shows what there is", () => {
  const [file] = readPatch(PATCH.slice(0, PATCH.indexOf(" three")));
  expect(file?.hunks[0]?.lines).toHaveLength(3);
});
