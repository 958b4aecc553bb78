/** Replaces what was found, in many files. */

import type { Tenant } from "@incus-gateway/client";

export interface Wanted {
  readonly query: string;
  readonly regex: boolean;
  readonly matchCase: boolean;
}

export interface Replaced {
  readonly files: number;
  readonly places: number;
  /** Those that could not be written, with the reason. */
  readonly failed: readonly { readonly path: string; readonly why: string }[];
}

/** Returns what finds a query. Throws where it is no pattern. */
export function patternOf({ query, regex, matchCase }: Wanted): RegExp {
  const source = regex ? query : query.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
  return new RegExp(source, `gm${matchCase ? "" : "i"}`);
}

/** Returns the text with each place replaced, and how many there were. `$1` stands for a group of a pattern only. */
export function replaced(text: string, wanted: Wanted, by: string): { text: string; places: number } {
  let places = 0;
  for (const _ of text.matchAll(patternOf(wanted))) places += 1;
  const replacement = wanted.regex ? by : by.replaceAll("$", "$$$$");
  return { text: places === 0 ? text : text.replace(patternOf(wanted), replacement), places };
}

/** Replaces in the present text of each file; a file that somebody writes meanwhile is left alone and reported. */
export async function replaceIn(
  tenant: Tenant,
  paths: readonly string[],
  wanted: Wanted,
  by: string,
): Promise<Replaced> {
  let [files, places] = [0, 0];
  const failed: { path: string; why: string }[] = [];
  for (const path of paths) {
    try {
      const content = await tenant.files.read(path);
      if (content.text === undefined) continue;
      const done = replaced(content.text, wanted, by);
      if (done.text === content.text) continue;
      await tenant.files.write(path, done.text, { ifMatch: content.etag });
      files += 1;
      places += done.places;
    } catch (error) {
      failed.push({ path, why: error instanceof Error ? error.message : String(error) });
    }
  }
  return { files, places, failed };
}
