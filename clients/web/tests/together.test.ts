/** Several who write one file at the same time, over a gateway whose answers take their time. */

import type { Tenant } from "@incus-gateway/client";
import { expect, test, vi } from "vitest";
import type { Doc } from "../src/editor/state/doc.js";
import { Documents } from "../src/editor/state/documents.js";
import { Shelf } from "./tenant.js";

const NAMES = ["ann", "bob", "agent"];
const TEXT = `${NAMES.map((name) => `# ${name}\n`).join("")}# end\n`;
const ROUNDS = 6;

/** Returns numbers from 0 to below `most` that look random and are the same each time. */
function numbers(seed: number): (most: number) => number {
  let state = seed * 2654435761;
  return (most) => {
    state = (Math.imul(state ^ (state >>> 15), 2246822519) + 374761393) >>> 0;
    return state % most;
  };
}

/** One window on the file. */
class Window {
  readonly documents: Documents;
  doc!: Doc;

  constructor(
    shelf: Shelf,
    readonly wait: () => Promise<void>,
    wrote: () => void,
  ) {
    const { files } = shelf.tenant;
    const late =
      <Given extends unknown[], Answer>(work: (...given: Given) => Promise<Answer>) =>
      async (...given: Given): Promise<Answer> => {
        await wait();
        const answer = work(...given);
        answer.catch(() => {});
        await wait();
        return answer;
      };
    const write = late(async (...given: Parameters<typeof files.write>) => {
      const written = await files.write(...given);
      wrote();
      return written;
    });
    const slow = { ...files, stat: late(files.stat), read: late(files.read), write };
    this.documents = new Documents(
      () => ({ files: slow }) as unknown as Tenant,
      () => false,
    );
  }

  /** Writes at the end of a person's line, one letter after the other, and saves. */
  async type(name: string, words: string): Promise<void> {
    for (const letter of words) {
      const { text, state } = this.doc;
      const from = text.indexOf("\n", text.indexOf(`# ${name}`));
      this.documents.updated(this.doc, state!.update({ changes: { from, insert: letter } }).state);
      await this.wait();
    }
    void this.documents.save(this.doc);
  }
}

test.each(Array.from({ length: 12 }, (_, seed) => seed + 1))("no word is lost (%i)", async (seed) => {
  const random = numbers(seed);
  const wait = () => new Promise<void>((resolve) => setTimeout(resolve, random(4)));
  const shelf = new Shelf({ "a.txt": TEXT });
  const windows: Window[] = [];
  const wrote = () => {
    for (const { documents } of windows)
      void wait().then(() =>
        documents.changed({ changes: [{ path: "a.txt", change: "changed" }], overflow: false }),
      );
  };
  for (const _ of NAMES.slice(0, 2)) windows.push(new Window(shelf, wait, wrote));
  for (const window of windows) window.doc = await window.documents.show("a.txt");
  const agent = async () => {
    for (let round = 0; round < ROUNDS; round++) {
      await wait();
      const text = shelf.text("a.txt")!; // an Edit is made at once
      shelf.put("a.txt", text.replace("\n# end", ` agent-${round}\n# end`));
      wrote();
    }
  };
  const person = async (window: Window, name: string) => {
    for (let round = 0; round < ROUNDS; round++) await window.type(name, ` ${name}-${round}`);
  };
  await Promise.all([person(windows[0]!, "ann"), person(windows[1]!, "bob"), agent()]);
  const words = (name: string) => Array.from({ length: ROUNDS }, (_, round) => ` ${name}-${round}`).join("");
  const whole = `${NAMES.map((name) => `# ${name}${words(name)}\n`).join("")}# end\n`;
  await vi.waitFor(
    () => {
      expect(shelf.text("a.txt")).toBe(whole);
      for (const { doc } of windows)
        expect([doc.text, doc.theirs.value, doc.dirty.value]).toEqual([whole, null, false]);
    },
    { timeout: 2000 },
  );
});
