/** The paths of all files that somebody may want to open, for the palette. */

import type { FileChanges, Tenant } from "@incus-gateway/client";
import { score } from "./fuzzy.js";
import { basename } from "./paths.js";

/** Folders that nobody edits in: they would fill the index. */
export const HEAVY = new Set([
  "node_modules",
  ".git",
  ".gateway",
  "dist",
  "build",
  ".vite",
  ".cache",
  ".next",
]);

/** How many folders and files are looked at, and how many folders at a time. */
const FOLDERS = 2000;
const FILES = 30_000;
const AT_ONCE = 8;

export class FileIndex {
  readonly #tenant: () => Tenant;
  #paths: Promise<readonly string[]> | null = null;

  constructor(tenant: () => Tenant) {
    this.#tenant = tenant;
  }

  /** Has the index made again when it is next asked, where files came or went. */
  changed({ changes, overflow }: FileChanges): void {
    if (overflow || changes.some(({ change }) => change !== "changed")) this.#paths = null;
  }

  /** Returns the files whose path answers `query`, the best first. */
  async find(query: string, most = 60): Promise<readonly string[]> {
    this.#paths ??= this.#look();
    const looking = this.#paths;
    looking.catch(() => {
      if (this.#paths === looking) this.#paths = null; // asked again next time
    });
    return (await looking)
      .map((path) => ({ path, points: score(path, query) }))
      .filter(({ points }) => points > 0)
      .sort((a, b) => b.points - a.points || a.path.length - b.path.length)
      .slice(0, most)
      .map(({ path }) => path);
  }

  async #look(): Promise<readonly string[]> {
    const { files } = this.#tenant();
    const paths: string[] = [];
    const folders = ["."];
    let looked = 0;
    while (folders.length > 0 && looked < FOLDERS && paths.length < FILES) {
      const some = folders.splice(0, AT_ONCE);
      looked += some.length;
      const told = await Promise.allSettled(some.map((folder) => files.list(folder)));
      if (looked === 1 && told[0]?.status === "rejected") throw told[0].reason;
      for (const one of told) {
        if (one.status === "rejected") continue; // it went meanwhile, or may not be read
        for (const { path, type } of one.value.entries) {
          if (type !== "directory") paths.push(path);
          else if (!HEAVY.has(basename(path))) folders.push(path);
        }
      }
    }
    return paths;
  }
}
