/** Says how well a name answers what somebody typed of it. */

import { basename } from "./paths.js";

const SEPARATOR = /[/._\- ]/;

/** Returns points, 0 where the text does not hold the query's characters in their order. */
export function score(text: string, query: string): number {
  if (query === "") return 1;
  const [where, what] = [text.toLowerCase(), query.toLowerCase().replaceAll(" ", "")];
  const name = basename(where);
  if (name === what) return 1000;
  if (name.startsWith(what)) return 800;
  if (name.includes(what)) return 600;
  if (where.includes(what)) return 500;
  const bare = where.replaceAll(/[/._\- ]/g, "");
  // as `uibutt` is in ui/button.tsx
  if (bare.includes(what.replaceAll(/[/._\- ]/g, ""))) return 400;
  return Math.max(along(where, what), along(name, what) && along(name, what) + 20);
}

/** Points for characters that stand apart: more where they follow one another, or begin a word. */
function along(text: string, query: string): number {
  let points = 0;
  // from the end: the last word of a path says most
  let at = text.length;
  let after = "";
  for (const char of [...query].reverse()) {
    const next = text.lastIndexOf(char, at - 1);
    if (next < 0 || at === 0) return 0;
    points += next === at - 1 && after !== "" ? 5 : SEPARATOR.test(text[next - 1] ?? "/") ? 4 : 1;
    at = next;
    after = char;
  }
  return points;
}
