/** Files that are dropped into the page or chosen for it: what they are, and their way into the tenant. */

import { GatewayError, type Tenant } from "@incus-gateway/client";
import { join } from "./paths.js";

export interface Dropped {
  /** Below the folder where it was dropped. */
  readonly path: string;
  readonly file: File;
}

/** More than that is no drop but a mistake. */
export const MOST = 2000;

/** Returns the files of a drop, those in folders too. Must be called before anything is awaited. */
export async function dropped(data: DataTransfer): Promise<readonly Dropped[]> {
  const entries = [...data.items].flatMap((item) => item.webkitGetAsEntry?.() ?? []);
  if (entries.length === 0) return [...data.files].map((file) => ({ path: file.name, file }));
  const found: Dropped[] = [];
  const visit = async (entry: FileSystemEntry, path: string): Promise<void> => {
    if (found.length >= MOST) throw new Error(`More than ${MOST} files: use the command line's cp for them.`);
    if (entry.isFile) {
      const file = await new Promise<File>((resolve, reject) =>
        (entry as FileSystemFileEntry).file(resolve, reject),
      );
      found.push({ path, file });
      return;
    }
    const reader = (entry as FileSystemDirectoryEntry).createReader();
    for (;;) {
      const some = await new Promise<FileSystemEntry[]>((resolve, reject) =>
        reader.readEntries(resolve, reject),
      );
      if (some.length === 0) return;
      for (const one of some) await visit(one, `${path}/${one.name}`);
    }
  };
  for (const entry of entries) await visit(entry, entry.name);
  return found;
}

/** Returns the etags of those that are there already. */
export async function taken(
  tenant: Tenant,
  folder: string,
  files: readonly Dropped[],
): Promise<ReadonlyMap<string, string>> {
  const there = new Map<string, string>();
  for (const { path } of files) {
    try {
      there.set(path, (await tenant.files.stat(join(folder, path))).etag);
    } catch (error) {
      if (!(error instanceof GatewayError) || error.code !== "not_found") throw error;
    }
  }
  return there;
}

/** Uploads one after the other; of a file that is there only the state that was agreed to is replaced. */
export async function upload(
  tenant: Tenant,
  folder: string,
  files: readonly Dropped[],
  there: ReadonlyMap<string, string>,
  told: (done: number) => void,
): Promise<void> {
  let done = 0;
  for (const { path, file } of files) {
    const etag = there.get(path);
    const condition = etag === undefined ? ({ ifNoneMatch: "*" } as const) : { ifMatch: etag };
    await tenant.files.upload(join(folder, path), file, condition);
    told(++done);
  }
}
