/** What was open in this tab before the page was loaded. */

import type { Left } from "./doc.js";

export interface Kept {
  readonly open: readonly Left[];
  readonly active: string | null;
  readonly folders: readonly string[];
}

/** Returns what was kept under this key. What is in storage is not trusted. */
export function kept(key: string): Kept {
  try {
    const found = JSON.parse(sessionStorage.getItem(key) ?? "null") as Partial<Kept> | null;
    const open = (found?.open ?? []).filter(({ path }) => typeof path === "string");
    return {
      open: open.map(({ path, anchor, head }) => ({
        path,
        anchor: Number(anchor) || 0,
        head: Number(head) || 0,
      })),
      active: typeof found?.active === "string" ? found.active : null,
      folders: (found?.folders ?? []).filter((folder) => typeof folder === "string"),
    };
  } catch {
    return { open: [], active: null, folders: [] };
  }
}
