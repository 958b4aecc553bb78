/** The package as it is installed: nothing but its files, in a folder of its own. */

import { execFileSync } from "node:child_process";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export const HERE = fileURLToPath(new URL("..", import.meta.url));

/** Packs the client and unpacks it below `folder`; returns where. */
export function installed(folder: string): string {
  const place = join(folder, "node_modules/@incus-gateway/client");
  const words = ["pack", "--silent", "--pack-destination", folder];
  const tarball = execFileSync("npm", words, { cwd: HERE, encoding: "utf8" }).trim().split("\n").at(-1) ?? "";
  mkdirSync(place, { recursive: true });
  execFileSync("tar", ["-xzf", join(folder, tarball), "--strip-components=1", "-C", place]);
  return place;
}
