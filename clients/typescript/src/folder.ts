/** A folder of this machine as a template, for Node and Bun: `gateway.deploy({ domain, template: await packed(…) })`. */

import { execFile } from "node:child_process";
import { readdir } from "node:fs/promises";
import { join, resolve } from "node:path";
import { Ignored } from "./ignored.js";

/** What the gateway leaves out too: it would be sent for nothing. */
const LEFT_OUT = ["node_modules", ".venv", "__pycache__", ".git", ".DS_Store"];
/** More than any gateway takes at once. */
const MOST = 256 << 20;

/**
 * Returns the gzipped tar of what is in a folder but for what its .gitignore files leave out, made by the program
 * `tar`. Throws where there is no such folder.
 */
export async function packed(folder: string, signal?: AbortSignal): Promise<Uint8Array> {
  const names = await chosen(folder, "", new Ignored(folder));
  if (names.length === 0) throw new Error(`${resolve(folder)} has nothing to deploy: a site has files`);
  const words = ["-czf", "-", "-C", resolve(folder), "--no-recursion", "--null", "-T", "-"];
  return await new Promise((done, failed) => {
    const options = { encoding: "buffer", maxBuffer: MOST, signal, windowsHide: true } as const;
    const tar = execFile("tar", words, options, (error, stdout) =>
      error === null ? done(stdout) : failed(error),
    );
    tar.stdin?.on("error", () => {}); // where tar ended before it read all, it says why itself
    tar.stdin?.end(names.map((name) => `${name}\0`).join(""));
  });
}

/** Returns what of a folder is sent, folders before what is in them. */
async function chosen(folder: string, at: string, ignored: Ignored): Promise<string[]> {
  const names: string[] = [];
  const entries = await readdir(join(folder, at), { withFileTypes: true });
  for (const entry of entries.sort((one, other) => (one.name < other.name ? -1 : 1))) {
    const path = at === "" ? entry.name : `${at}/${entry.name}`;
    if (LEFT_OUT.includes(entry.name) || (await ignored.has(path, entry.isDirectory()))) continue;
    names.push(path);
    if (entry.isDirectory()) names.push(...(await chosen(folder, path, ignored)));
  }
  return names;
}
