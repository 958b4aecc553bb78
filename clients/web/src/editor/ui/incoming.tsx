/** Files that come into the tree: dropped, chosen, or moved from another folder. */

import { GatewayError } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { basename, join, within } from "../state/paths.js";
import { complain, say } from "../state/toasts.js";
import { type Dropped, dropped, taken, upload } from "../state/uploads.js";
import type { Workspace } from "../state/workspace.js";
import { Dialog } from "./parts.js";

/** The folder over which something is dragged. */
export const over = signal<string | null>(null);
/** The kind of what is dragged: a file or folder of this tree. */
export const PATH = "application/x-gateway-path";

/** Has the browser ask which files to upload into a folder. */
export function choose(current: Workspace, folder: string): void {
  const input = document.createElement("input");
  input.type = "file";
  input.multiple = true;
  input.onchange = () => {
    const files = [...(input.files ?? [])].map((file) => ({ path: file.name, file }));
    void bring(current, folder, Promise.resolve(files));
  };
  input.click();
}

/** Takes files from outside, and those of the tree, into a folder. */
export function dropping(current: Workspace, folder: () => string) {
  const takes = (event: DragEvent) =>
    event.dataTransfer?.types.includes("Files") || event.dataTransfer?.types.includes(PATH);
  return {
    onDragOver: (event: DragEvent) => {
      if (!takes(event)) return;
      event.preventDefault();
      event.stopPropagation();
      over.value = folder();
    },
    onDragLeave: () => {
      over.value = null;
    },
    onDrop: (event: DragEvent) => {
      if (!takes(event) || event.dataTransfer === null) return;
      event.preventDefault();
      event.stopPropagation();
      over.value = null;
      const to = folder();
      const from = event.dataTransfer.getData(PATH);
      if (from === "") void bring(current, to, dropped(event.dataTransfer));
      else void moveTo(current, from, to);
    },
  };
}

async function moveTo(current: Workspace, from: string, folder: string): Promise<void> {
  const to = join(folder, basename(from));
  if (to === from || within(folder, from) || !current.reachable) return;
  try {
    await current.documents.move(from, to, current.tree.move(from, to));
  } catch (error) {
    refused(error, basename(from));
  }
}

/** Tells why a file did not get a name. */
export function refused(error: unknown, name: string): void {
  const exists = error instanceof GatewayError && error.facts.reason === "exists";
  complain(exists ? new Error(`${name} already exists here.`) : error, exists ? undefined : name);
}

interface Bringing {
  readonly folder: string;
  readonly files: readonly Dropped[];
  readonly there: ReadonlyMap<string, string>;
}

/** What would be replaced by a drop, which is asked about. */
export const replacing = signal<Bringing | null>(null);

async function bring(current: Workspace, folder: string, found: Promise<readonly Dropped[]>): Promise<void> {
  if (!current.reachable) return;
  try {
    const files = await found;
    const there = await taken(current.tenant, folder, files);
    if (there.size > 0) replacing.value = { folder, files, there };
    else await send(current, { folder, files, there });
  } catch (error) {
    complain(error, "Uploading");
  }
}

async function send(current: Workspace, { folder, files, there }: Bringing): Promise<void> {
  const name = files.length === 1 ? (files[0]?.path ?? "") : `${files.length} files`;
  try {
    await upload(current.tenant, folder, files, there, () => {});
    say(`Uploaded ${name}${folder === "." ? "" : ` to ${folder}`}.`);
  } catch (error) {
    complain(error, `Uploading ${name}`);
  }
}

export function Replacing({ asked, current }: { asked: Bringing; current: Workspace }) {
  const close = () => {
    replacing.value = null;
  };
  const names = [...asked.there.keys()];
  const go = (files: readonly Dropped[]) => {
    close();
    void send(current, { ...asked, files });
  };
  return (
    <Dialog label="Replace files" class="small" onClose={close}>
      <h2>
        Replace {names.length === 1 ? names[0] : `${names.length} files`}
        {asked.folder === "." ? "" : ` in ${asked.folder}`}?
      </h2>
      <p>{names.slice(0, 8).join(", ")}: the current text is lost.</p>
      <footer>
        <button type="button" onClick={close}>
          Cancel
        </button>
        {asked.files.length > names.length && (
          <button type="button" onClick={() => go(asked.files.filter(({ path }) => !asked.there.has(path)))}>
            Only new ones
          </button>
        )}
        <button type="button" class="danger" onClick={() => go(asked.files)}>
          Replace
        </button>
      </footer>
    </Dialog>
  );
}
