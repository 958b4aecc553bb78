/** Brings what others wrote into a text that has unsaved changes of its own. */

import { diff } from "@codemirror/merge";
import { ChangeSet, type Text } from "@codemirror/state";

interface Edit {
  readonly from: number;
  readonly to: number;
  readonly insert: string;
}

/** Texts that differ too much are compared roughly, so that typing never stalls. */
const CARE = { scanLimit: 1000, timeout: 200 };

function edits(base: string, text: string): readonly Edit[] {
  return diff(base, text, CARE).map(({ fromA, toA, fromB, toB }) => ({
    from: fromA,
    to: toA,
    insert: text.slice(fromB, toB),
  }));
}

/** Moves the insertion of whole lines to the end of the line before, so that it touches neither neighbour. */
function placed(base: Text, edit: Edit): Edit {
  let { from, insert } = edit;
  if (from !== edit.to) return edit;
  // a diff may split the insertion around a common line start; move that start to its end
  const end = insert.indexOf("\n") + 1;
  if (base.sliceString(from, from + end) === insert.slice(0, end)) {
    from += end;
    insert = insert.slice(end) + insert.slice(0, end);
  }
  if (from === 0 || base.lineAt(from).from !== from || !insert.endsWith("\n")) return edit;
  return { from: from - 1, to: from - 1, insert: `\n${insert.slice(0, -1)}` };
}

/** Returns the first and last line that an edit changes; for inserted lines, a number between their neighbours. */
function lines(base: Text, { from, to, insert }: Edit): readonly [number, number] {
  const line = base.lineAt(from);
  if (from === to && line.to === from && insert.startsWith("\n"))
    return [line.number + 0.5, line.number + 0.5];
  return [line.number, base.lineAt(to).number];
}

/**
 * Returns the changes that merge what `theirs` changed since `base` into `mine`. Edits that overlap, or touch
 * neighbouring lines as one edit, conflict: with `mineWins` mine are kept, otherwise the result is null.
 */
export function incoming(base: Text, mine: Text, theirs: Text, mineWins = false): ChangeSet | null {
  const own = edits(base.toString(), mine.toString()).map((edit) => placed(base, edit));
  const others: Edit[] = [];
  for (const found of edits(base.toString(), theirs.toString())) {
    const edit = placed(base, found);
    if (own.some(({ from, to, insert }) => from === edit.from && to === edit.to && insert === edit.insert))
      continue;
    const [first, last] = lines(base, edit);
    const both = own.some((done) => {
      const [begin, end] = lines(base, done);
      return first <= end && begin <= last;
    });
    if (!both) others.push(edit);
    else if (!mineWins) return null;
  }
  return ChangeSet.of(others, base.length).map(ChangeSet.of(own, base.length));
}
