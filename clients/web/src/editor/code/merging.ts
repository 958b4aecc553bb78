/** Brings what others wrote into a text that has unsaved changes of its own. */

import { diff } from "@codemirror/merge";
import { ChangeSet, type Text } from "@codemirror/state";

interface Edit {
  readonly from: number;
  readonly to: number;
  readonly insert: string;
}

/** A text that differs too much is compared roughly: it must not hold up who types. */
const CARE = { scanLimit: 1000, timeout: 200 };

function edits(base: string, text: string): readonly Edit[] {
  return diff(base, text, CARE).map(({ fromA, toA, fromB, toB }) => ({
    from: fromA,
    to: toA,
    insert: text.slice(fromB, toB),
  }));
}

/**
 * Returns the changes to `mine` that bring in what `theirs` changed since `base`; null where both changed the same
 * lines, or lines next to one another within one edit.
 */
export function incoming(base: Text, mine: Text, theirs: Text): ChangeSet | null {
  const own = edits(base.toString(), mine.toString());
  const others = edits(base.toString(), theirs.toString()).filter(
    (edit) =>
      !own.some((done) => done.from === edit.from && done.to === edit.to && done.insert === edit.insert),
  );
  const lines = ({ from, to }: Edit) => [base.lineAt(from).number, base.lineAt(to).number] as const;
  for (const edit of others) {
    const [first, last] = lines(edit);
    for (const done of own) {
      const [begin, end] = lines(done);
      if (first <= end && begin <= last) return null;
    }
  }
  return ChangeSet.of([...others], base.length).map(ChangeSet.of([...own], base.length));
}
