/** The TypeScript examples of the docs, as they stand there. */

import { readFileSync } from "node:fs";
import { mkdir, rm, writeFile } from "node:fs/promises";
import { vi } from "vitest";

/** Returns the one example of a page in which a word stands. */
export function example(word: string, page = "docs/clients.md"): string {
  const text = readFileSync(new URL(`../../../${page}`, import.meta.url), "utf8");
  const blocks = [...text.matchAll(/^ *```(?:ts|typescript)\n(.*?)^ *```$/gms)].map(
    ([, block]) => block ?? "",
  );
  const [found, ...more] = blocks.filter((block) => block.includes(word));
  if (found === undefined || more.length > 0) throw new Error(`not one example of ${page} has ${word}`);
  return found;
}

/** Runs an example on the client's source, with some of its words replaced, and returns what it logs. */
export async function run(text: string, words: Readonly<Record<string, string>>): Promise<unknown[][]> {
  let program = text;
  for (const [word, other] of Object.entries({ "@incus-gateway/client": "../src/index.js", ...words })) {
    if (!program.includes(word)) throw new Error(`the example lacks ${word}`);
    program = program.replace(word, () => other);
  }
  // where the packages are found, and no compiler looks for what a killed run left
  const folder = new URL("../examples.run/", import.meta.url);
  await mkdir(folder, { recursive: true });
  const file = new URL(`${crypto.randomUUID()}.ts`, folder);
  await writeFile(file, `${program}\nexport {};\n`);
  const log = vi.spyOn(console, "log").mockImplementation(() => {});
  try {
    await import(file.pathname);
    return log.mock.calls;
  } finally {
    log.mockRestore();
    await rm(file);
  }
}
