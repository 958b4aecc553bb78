/** This browser tab's name, which outlives a reload and a crash, and which other tabs are there. */

import { unique } from "@incus-gateway/client";

const KEY = "gateway.tab";
/** Milliseconds for the page that was here before to be gone. */
const PATIENCE = 1000;
/** Without them, over plain HTTP from another machine, nobody knows of other tabs. */
const locks: LockManager | null = navigator.locks ?? null;

function lock(id: string): string {
  return `${KEY}.${id}`;
}

/** Holds the tab's name for as long as the page lives; false where another page does: a duplicated tab. */
function hold(id: string, manager: LockManager): Promise<boolean> {
  return new Promise((resolve) => {
    const held = () => {
      resolve(true);
      return new Promise<void>(() => {});
    };
    manager.request(lock(id), { signal: AbortSignal.timeout(PATIENCE) }, held).catch(() => resolve(false));
  });
}

async function settle(): Promise<string> {
  let id = sessionStorage.getItem(KEY) ?? unique();
  if (locks !== null && !(await hold(id, locks))) {
    id = unique();
    void hold(id, locks);
  }
  try {
    sessionStorage.setItem(KEY, id);
  } catch {
    // storage is forbidden: the tab has another name next time
  }
  return id;
}

let settled: Promise<string> | null = null;

export function tab(): Promise<string> {
  settled ??= settle();
  return settled;
}

/** Returns whether a tab is gone, as far as that is known. */
export async function gone(): Promise<(id: string) => boolean> {
  if (locks === null) return () => false;
  const { held = [] } = await locks.query();
  const names = new Set(held.map(({ name }) => name));
  return (id) => !names.has(lock(id));
}
