/**
 * Keeps unsaved texts in this browser's IndexedDB, so that they outlive a reload, a crash of the tab and the browser's
 * end. Those of a tab that is gone come back in the next one of the same person and tenant.
 */

import { gone, tab } from "./tab.js";

export interface Draft {
  readonly key: string;
  readonly tab: string;
  readonly owner: string;
  readonly tenant: string;
  readonly path: string;
  readonly text: string;
  /** The file's text that was changed. */
  readonly base: string;
  /** When it was kept, in milliseconds since the epoch. */
  readonly at: number;
}

/** What is longer is not kept, nor the oldest of what is more than that together, in characters. */
const LONGEST = 4 << 20;
const MOST = 32 << 20;
const DAYS = 14;
/** Milliseconds without a key until a text is kept, and the most that one who goes on typing waits. */
const REST = 250;
const PATIENCE = 2000;

const STORE = "drafts";

function done<Value>(request: IDBRequest<Value>): Promise<Value> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

let opened: Promise<IDBDatabase> | null = null;

function database(): Promise<IDBDatabase> {
  opened ??= (async () => {
    const request = indexedDB.open("gateway-editor", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "key" });
    const made = await done(request);
    made.onversionchange = () => made.close();
    return made;
  })();
  return opened;
}

async function store(mode: IDBTransactionMode): Promise<IDBObjectStore> {
  return (await database()).transaction(STORE, mode).objectStore(STORE);
}

/** What is unsaved in one document, or null where nothing is. */
export type Unsaved = { readonly text: string; readonly base: string } | null;

/** Keeps unsaved texts elsewhere than in this page. */
export interface Keeping {
  touch(path: string, look: () => Unsaved): void;
  drop(path: string): void;
  flush(): Promise<void>;
}

export class Drafts {
  readonly #due = new Map<string, { readonly look: () => Unsaved; readonly since: number }>();
  readonly #unkept = new Set<string>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #writing: Promise<void> = Promise.resolve();

  constructor(
    readonly tenant: string,
    readonly owner: () => string,
  ) {}

  /** Whether there is unsaved text that would be lost with the page. */
  get atRisk(): boolean {
    return this.#unkept.size > 0;
  }

  /** Has the unsaved text of a file kept, or let go of, once nobody types for a moment. */
  touch(path: string, look: () => Unsaved): void {
    const now = Date.now();
    const since = this.#due.get(path)?.since ?? now;
    this.#due.set(path, { look, since });
    this.#unkept.add(path);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.flush(), Math.max(0, Math.min(REST, since + PATIENCE - now)));
  }

  /** Keeps at once what waits for it. */
  flush(): Promise<void> {
    clearTimeout(this.#timer);
    const due = [...this.#due].map(([path, { look }]) => [path, look()] as const);
    this.#due.clear();
    this.#writing = this.#writing.then(() => this.#write(due)).catch(() => {}); // what is unkept is asked about
    return this.#writing;
  }

  async #write(due: readonly (readonly [string, Unsaved])[]): Promise<void> {
    const own = await tab();
    const drafts = await store("readwrite");
    await Promise.all(
      due.map(async ([path, unsaved]) => {
        const key = JSON.stringify([own, this.tenant, path]);
        const length = unsaved === null ? 0 : unsaved.text.length + unsaved.base.length;
        if (unsaved === null || length > LONGEST) await done(drafts.delete(key));
        else {
          const { tenant } = this;
          await done(
            drafts.put({ key, tab: own, owner: this.owner(), tenant, path, ...unsaved, at: Date.now() }),
          );
        }
        if (length <= LONGEST && !this.#due.has(path)) this.#unkept.delete(path);
      }),
    );
  }

  /** Lets go of a file's text, of which nothing is to be kept any more. */
  drop(path: string): void {
    this.touch(path, () => null);
  }

  /** Returns what this tab had, or tabs that are gone, the latest of each file; the rest that is old is removed. */
  async take(): Promise<readonly Draft[]> {
    const [own, isGone] = await Promise.all([tab(), gone()]);
    const drafts = await store("readwrite");
    const all = ((await done(drafts.getAll())) as Draft[]).sort((a, b) => b.at - a.at);
    const found = new Map<string, Draft>();
    let length = 0;
    for (const draft of all) {
      length += draft.text.length + draft.base.length;
      if (length > MOST || Date.now() - draft.at > DAYS * 86_400_000) {
        drafts.delete(draft.key);
        continue;
      }
      if (draft.owner !== this.owner() || draft.tenant !== this.tenant) continue;
      if (draft.tab !== own && !isGone(draft.tab)) continue;
      if (found.has(draft.path)) continue;
      found.set(draft.path, draft);
      if (draft.tab === own) continue;
      // from now on it is this tab's
      drafts.delete(draft.key);
      drafts.put({ ...draft, tab: own, key: JSON.stringify([own, this.tenant, draft.path]) });
    }
    return [...found.values()];
  }
}
