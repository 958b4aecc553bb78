/** A folder of this machine as a template, for Node and Bun: `gateway.deploy({ domain, template: await packed(…) })`. */

import { execFile } from "node:child_process";
import { readdir } from "node:fs/promises";
import { resolve } from "node:path";

/** What the gateway leaves out too: it would be sent for nothing. */
const LEFT_OUT = ["node_modules", ".venv", "__pycache__", ".git", ".DS_Store"];
/** More than any gateway takes at once. */
const MOST = 256 << 20;

/** Returns the gzipped tar of what is in a folder, made by the program `tar`. Throws where there is no such folder. */
export async function packed(folder: string, signal?: AbortSignal): Promise<Uint8Array> {
  const names = (await readdir(folder)).filter((name) => !LEFT_OUT.includes(name)).sort();
  if (names.length === 0) throw new Error(`${resolve(folder)} is empty: a template has a site.toml`);
  const excluded = LEFT_OUT.map((name) => `--exclude=${name}`);
  const words = ["-czf", "-", ...excluded, "-C", resolve(folder), "--", ...names];
  return await new Promise((done, failed) => {
    const options = { encoding: "buffer", maxBuffer: MOST, signal, windowsHide: true } as const;
    execFile("tar", words, options, (error, stdout) => (error === null ? done(stdout) : failed(error)));
  });
}
