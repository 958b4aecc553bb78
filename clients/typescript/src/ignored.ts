/** Tells what the .gitignore files of a folder leave out, by git's rules (gitignore(5)). */

import { lstat, open } from "node:fs/promises";
import { join } from "node:path";

/** Bytes of one file, and rules. */
const TEXT_MAX = 64 << 10;
const RULES_MAX = 2000;

interface Rule {
  readonly negated: boolean;
  readonly foldersOnly: boolean;
  readonly pattern: RegExp;
}

/** Says of a path below a folder whether it is left out; ask for a folder before what is in it. */
export class Ignored {
  readonly #folder: string;
  readonly #rules = new Map<string, readonly Rule[]>();

  constructor(folder: string) {
    this.#folder = folder;
  }

  async has(path: string, isFolder: boolean): Promise<boolean> {
    let above = path;
    while (above !== "") {
      // the innermost file decides, and in it the last rule
      above = above.slice(0, Math.max(0, above.lastIndexOf("/")));
      const inner = above === "" ? path : path.slice(above.length + 1);
      const rules = await this.#of(above);
      const rule = rules.findLast(
        ({ foldersOnly, pattern }) => (isFolder || !foldersOnly) && pattern.test(inner),
      );
      if (rule !== undefined) return !rule.negated;
    }
    return false;
  }

  async #of(folder: string): Promise<readonly Rule[]> {
    let rules = this.#rules.get(folder);
    if (rules === undefined) {
      const lines = (await text(join(this.#folder, folder, ".gitignore"))).split("\n", RULES_MAX);
      rules = lines.map(ruleOf).filter((rule) => rule !== undefined);
      this.#rules.set(folder, rules);
    }
    return rules;
  }
}

async function text(path: string): Promise<string> {
  try {
    if (!(await lstat(path)).isFile()) return "";
    const file = await open(path);
    try {
      const { buffer, bytesRead } = await file.read(Buffer.alloc(TEXT_MAX), 0, TEXT_MAX, 0);
      return buffer.toString("utf8", 0, bytesRead);
    } finally {
      await file.close();
    }
  } catch {
    return "";
  }
}

function ruleOf(said: string): Rule | undefined {
  let line = said.replace(/\r$/, "");
  const stripped = line.replace(/ +$/, "");
  line = stripped.endsWith("\\") && stripped !== line ? `${stripped} ` : stripped;
  if (line === "" || line.startsWith("#")) return undefined;
  const negated = line.startsWith("!");
  line = line.slice(Number(negated));
  const foldersOnly = line.endsWith("/");
  line = line.slice(0, line.length - Number(foldersOnly));
  if (line === "") return undefined;
  const start = line.includes("/") ? "" : "(?:.*/)?";
  try {
    return {
      negated,
      foldersOnly,
      pattern: new RegExp(`^${start}${patternOf(line.replace(/^\//, ""))}$`, "s"),
    };
  } catch {
    return undefined;
  }
}

/** Returns a glob of git as a regular expression. */
function patternOf(glob: string): string {
  let found = "";
  for (let at = 0; at < glob.length; ) {
    const rest = glob.slice(at);
    const whole = at === 0 || glob[at - 1] === "/";
    const several = /^\[([!^]?)(\]?(?:\\.|[^\]\\])*)\]/s.exec(rest);
    if (whole && rest.startsWith("**/")) {
      found += "(?:.*/)?";
      at += 3;
    } else if (whole && rest === "**") {
      found += ".+";
      at += 2;
    } else if (rest.startsWith("*")) {
      found += "[^/]*";
      at += rest.length - rest.replace(/^\*+/, "").length;
    } else if (rest.startsWith("?")) {
      found += "[^/]";
      at += 1;
    } else if (several !== null) {
      const members = (several[2] ?? "").replace(/[[\]^]/g, "\\$&");
      found += `(?!/)[${several[1] ? "^" : ""}${members}]`;
      at += several[0].length;
    } else {
      const escaped = rest.length > 1 && rest.startsWith("\\");
      found += rest.charAt(Number(escaped)).replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");
      at += 1 + Number(escaped);
    }
  }
  return found;
}
