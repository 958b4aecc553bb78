/** Reads a unified patch, as git writes it, into what can be shown: files with numbered lines. */

export type LineKind = "same" | "added" | "removed" | "note";

export interface PatchLine {
  readonly kind: LineKind;
  /** Its number in the file before and after; null where it is not there. */
  readonly before: number | null;
  readonly after: number | null;
  readonly text: string;
}

export interface PatchHunk {
  readonly heading: string;
  readonly lines: readonly PatchLine[];
}

export interface PatchFile {
  readonly path: string;
  /** What happened to the file as a whole, in words; null where its lines say all. */
  readonly note: string | null;
  readonly hunks: readonly PatchHunk[];
}

const HUNK = /^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@ ?(.*)$/;
const NOTES: readonly (readonly [RegExp, string])[] = [
  [/^new file mode/, "new file"],
  [/^deleted file mode/, "deleted"],
  [/^rename from (.*)/, "renamed"],
  [/^(Binary files|GIT binary patch)/, "binary"],
  [/^new mode 100755/, "made executable"],
];

export function readPatch(patch: string): readonly PatchFile[] {
  const files: { path: string; note: string | null; hunks: { heading: string; lines: PatchLine[] }[] }[] = [];
  let [before, after, beforeLeft, afterLeft] = [0, 0, 0, 0];
  for (const line of patch.split("\n")) {
    const file = files.at(-1);
    const hunk = file?.hunks.at(-1);
    // only counts tell a removed line "-- a" from a heading
    if (hunk !== undefined && (beforeLeft > 0 || afterLeft > 0)) {
      const text = line.slice(1);
      if (line.startsWith("+")) {
        hunk.lines.push({ kind: "added", before: null, after: after++, text });
        afterLeft--;
      } else if (line.startsWith("-")) {
        hunk.lines.push({ kind: "removed", before: before++, after: null, text });
        beforeLeft--;
      } else if (line.startsWith(" ")) {
        hunk.lines.push({ kind: "same", before: before++, after: after++, text });
        beforeLeft--;
        afterLeft--;
      }
      continue;
    }
    if (line.startsWith("diff --git ")) {
      files.push({ path: pathOf(line), note: null, hunks: [] });
      continue;
    }
    if (file === undefined) continue;
    const found = HUNK.exec(line);
    if (found !== null) {
      [before, beforeLeft, after, afterLeft] = [1, 2, 3, 4].map((at) => Number(found[at] ?? 1)) as [
        number,
        number,
        number,
        number,
      ];
      file.hunks.push({ heading: found[5] ?? "", lines: [] });
    } else if (line.startsWith("\\") && hunk !== undefined) {
      hunk.lines.push({ kind: "note", before: null, after: null, text: line.slice(2) });
    } else if (line.startsWith("+++ ") && line !== "+++ /dev/null")
      file.path = named(line.slice(4)) ?? file.path;
    else file.note = NOTES.find(([pattern]) => pattern.test(line))?.[1] ?? file.note;
  }
  return files;
}

/** `diff --git a/x b/x`: both are the same where no `+++` line says it better. */
function pathOf(line: string): string {
  const rest = line.slice("diff --git ".length);
  return named(rest.slice(Math.ceil(rest.length / 2))) ?? rest;
}

/** Git quotes names with other characters than ASCII's, byte by byte. */
function named(word: string): string | null {
  let name = word.trim().replace(/\t$/, "");
  if (name.startsWith('"')) {
    const bytes: number[] = [];
    for (const [, octal, escaped, plain] of name.slice(1, -1).matchAll(/\\([0-7]{3})|\\(.)|([^\\]+)/g)) {
      if (octal !== undefined) bytes.push(Number.parseInt(octal, 8));
      else if (escaped !== undefined) bytes.push(...new TextEncoder().encode(ESCAPES[escaped] ?? escaped));
      else bytes.push(...new TextEncoder().encode(plain));
    }
    name = new TextDecoder().decode(new Uint8Array(bytes));
  }
  return /^[ab]\//.test(name) ? name.slice(2) : null;
}

const ESCAPES: Readonly<Record<string, string>> = { n: "\n", t: "\t", r: "\r" };
