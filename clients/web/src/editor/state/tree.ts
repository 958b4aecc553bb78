/** The file tree's state: which folders are read and open, kept current by the watcher. */

import type { Entry, FileChanges, Tenant } from "@incus-gateway/client";
import { computed, signal } from "@preact/signals";
import { basename, parent, within } from "./paths.js";

export interface Row {
  readonly path: string;
  readonly name: string;
  readonly depth: number;
  readonly entry: Entry;
  readonly open: boolean;
  readonly loading: boolean;
}

/** What a new row is for, while its name is typed. */
export interface Draft {
  readonly folder: string;
  readonly kind: "file" | "directory" | "rename";
  readonly from?: string;
}

const ORDER = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

export class Tree {
  readonly #tenant: () => Tenant;
  readonly #folders = signal<ReadonlyMap<string, readonly Entry[]>>(new Map());
  readonly #open = signal<ReadonlySet<string>>(new Set());
  readonly #loading = signal<ReadonlySet<string>>(new Set());
  readonly #due = new Set<string>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  readonly failure = signal<string | null>(null);
  readonly selected = signal<string | null>(null);
  readonly draft = signal<Draft | null>(null);
  /** When each path was last changed by someone else, for the mark that fades. */
  readonly touched = signal<ReadonlyMap<string, number>>(new Map());

  readonly rows = computed<readonly Row[]>(() => {
    const rows: Row[] = [];
    const visit = (folder: string, depth: number) => {
      for (const entry of this.#folders.value.get(folder) ?? []) {
        const open = entry.type === "directory" && this.#open.value.has(entry.path);
        const loading = this.#loading.value.has(entry.path);
        rows.push({ path: entry.path, name: basename(entry.path), depth, entry, open, loading });
        if (open) visit(entry.path, depth + 1);
      }
    };
    visit(".", 0);
    return rows;
  });

  constructor(tenant: () => Tenant, open: readonly string[]) {
    this.#tenant = tenant;
    this.#open.value = new Set(open);
  }

  get loaded(): boolean {
    return this.#folders.value.has(".");
  }

  get open(): readonly string[] {
    return [...this.#open.value];
  }

  async load(folder = "."): Promise<void> {
    this.#loading.value = new Set([...this.#loading.value, folder]);
    try {
      const { entries } = await this.#tenant().files.list(folder);
      const sorted = [...entries].sort(
        (a, b) =>
          Number(b.type === "directory") - Number(a.type === "directory") ||
          ORDER.compare(basename(a.path), basename(b.path)),
      );
      this.#folders.value = new Map([...this.#folders.value, [folder, sorted]]);
      if (folder === ".") this.failure.value = null;
      const below = sorted.filter((entry) => entry.type === "directory" && this.#open.value.has(entry.path));
      await Promise.all(
        below.filter(({ path }) => !this.#folders.value.has(path)).map(({ path }) => this.load(path)),
      );
    } catch (error) {
      if (folder === ".") this.failure.value = error instanceof Error ? error.message : String(error);
      else this.#forget(folder);
    } finally {
      const loading = new Set(this.#loading.value);
      loading.delete(folder);
      this.#loading.value = loading;
    }
  }

  toggle(path: string, open = !this.#open.value.has(path)): void {
    const set = new Set(this.#open.value);
    if (open) set.add(path);
    else set.delete(path);
    this.#open.value = set;
    // read again each time: what is below an ignored folder is not watched
    if (open) void this.load(path);
  }

  /** Opens the folders above a file, and selects it. */
  async reveal(path: string): Promise<void> {
    const above: string[] = [];
    for (let folder = parent(path); folder !== "."; folder = parent(folder)) above.unshift(folder);
    this.#open.value = new Set([...this.#open.value, ...above]);
    for (const folder of above) if (!this.#folders.value.has(folder)) await this.load(folder);
    this.selected.value = path;
  }

  /** Takes the changes of the watcher: reads the shown folders again that changed. */
  changed({ changes, overflow }: FileChanges): void {
    const shown = this.#folders.value;
    if (overflow) for (const folder of shown.keys()) this.#due.add(folder);
    const touched = new Map(this.touched.value);
    for (const { path, change } of changes) {
      if (change !== "changed" && shown.has(parent(path))) this.#due.add(parent(path));
      if (change === "removed") touched.delete(path);
      else touched.set(path, Date.now());
    }
    if (changes.length > 0) {
      const recent = [...touched].sort((a, b) => b[1] - a[1]).slice(0, 200);
      this.touched.value = new Map(recent);
    }
    if (this.#due.size === 0) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      const due = [...this.#due];
      this.#due.clear();
      for (const folder of due) void this.load(folder);
    }, 60);
  }

  /** Reads all shown folders again. */
  refresh(): void {
    this.changed({ changes: [], overflow: true });
    if (!this.loaded) void this.load();
  }

  async create(path: string, kind: "file" | "directory"): Promise<void> {
    const { files } = this.#tenant();
    if (kind === "file") await files.write(path, "", { ifNoneMatch: "*", createDirs: true });
    else await files.mkdir(path);
    await this.load(parent(path));
    await this.reveal(path);
  }

  /** Moves a file or folder; resolves as soon as it is there. */
  async move(from: string, to: string): Promise<void> {
    await this.#tenant().files.move(from, to, { createDirs: true });
    void Promise.all([...new Set([parent(from), parent(to)])].map((folder) => this.load(folder))).then(() =>
      this.reveal(to),
    );
  }

  /** Removes a file or folder; resolves as soon as it is gone. */
  async remove(path: string): Promise<void> {
    await this.#tenant().files.remove(path, { recursive: true });
    void this.load(parent(path));
  }

  #forget(folder: string): void {
    this.#folders.value = new Map([...this.#folders.value].filter(([path]) => !within(path, folder)));
    this.#open.value = new Set([...this.#open.value].filter((path) => !within(path, folder)));
  }
}
