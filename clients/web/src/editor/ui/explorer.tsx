/** The file tree, with its keyboard control. */

import { signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { area } from "../state/layout.js";
import { basename, join, parent, within } from "../state/paths.js";
import { allows, gateway } from "../state/session.js";
import { complain } from "../state/toasts.js";
import type { Draft, Row } from "../state/tree.js";
import type { Workspace } from "../state/workspace.js";
import { choose, dropping, over, PATH, Replacing, refused, replacing } from "./incoming.js";
import { type MenuItem, showMenu } from "./menu.js";
import { copy, Dialog, Empty, FileIcon, Icon, IconButton, Spinner } from "./parts.js";
import { Rows } from "./virtual.js";

const removing = signal<string | null>(null);
const FRESH = 20_000;

export function Explorer({ current }: { current: Workspace }) {
  const { tree, documents } = current;
  const rows = tree.rows.value;
  const draft = tree.draft.value;
  const writes = allows("files:write");
  const shown = withDraft(rows, draft);
  const at = rows.findIndex(({ path }) => path === tree.selected.value);

  const open = (row: Row) => {
    tree.selected.value = row.path;
    if (row.entry.type === "directory") tree.toggle(row.path);
    else {
      void documents.show(row.path);
      area.value = "editor";
    }
  };
  const begin = (kind: "file" | "directory") => {
    const where = folderOf(rows[at]);
    if (where !== ".") tree.toggle(where, true);
    tree.draft.value = { folder: where, kind };
  };
  const menu = (event: MouseEvent, row: Row | undefined) => {
    if (row !== undefined) tree.selected.value = row.path;
    showMenu(event, row?.name ?? "Files", treeMenu(current, row, begin, open));
  };
  const keys = (event: KeyboardEvent) => {
    if (event.target instanceof HTMLInputElement || event.ctrlKey || event.metaKey || event.altKey) return;
    const row = rows[at];
    const to = (index: number) => {
      const next = rows[Math.max(0, Math.min(rows.length - 1, index))];
      if (next !== undefined) tree.selected.value = next.path;
    };
    const acts: Record<string, () => void> = {
      ArrowDown: () => to(at + 1),
      ArrowUp: () => to(at < 0 ? 0 : at - 1),
      Home: () => to(0),
      End: () => to(rows.length - 1),
      PageDown: () => to(at + 15),
      PageUp: () => to(at - 15),
      Enter: () => row && open(row),
      " ": () => row && open(row),
      ArrowRight: () => {
        if (row?.entry.type !== "directory") return;
        if (row.open) to(at + 1);
        else tree.toggle(row.path, true);
      },
      ArrowLeft: () => {
        if (row === undefined) return;
        if (row.open) tree.toggle(row.path, false);
        else if (parent(row.path) !== ".") tree.selected.value = parent(row.path);
      },
      F2: () => {
        if (row && writes) tree.draft.value = { folder: parent(row.path), kind: "rename", from: row.path };
      },
      Delete: () => {
        if (row && writes) removing.value = row.path;
      },
    };
    const act = acts[event.key];
    if (act === undefined) return;
    event.preventDefault();
    act();
  };

  return (
    <section class="side-view" aria-label="Files">
      <header>
        <h2>Files</h2>
        <span class="grow" />
        {writes && <IconButton icon="file-plus" label="New file" onClick={() => begin("file")} />}
        {writes && <IconButton icon="folder-plus" label="New folder" onClick={() => begin("directory")} />}
        <IconButton icon="refresh-cw" label="Refresh" onClick={() => tree.refresh()} />
      </header>
      {tree.failure.value !== null && !tree.loaded ? (
        <Empty icon="circle-alert" title="The files cannot be read">
          {tree.failure.value}
        </Empty>
      ) : rows.length === 0 && draft === null ? (
        tree.loaded ? (
          <Empty icon="folder-open" title="This workspace is empty">
            Create a file, or deploy a template.
          </Empty>
        ) : (
          <div class="skeleton" aria-hidden="true">
            {[62, 48, 75, 40, 56, 68].map((width) => (
              <span key={width} style={{ width: `${width}%` }} />
            ))}
          </div>
        )
      ) : (
        <Rows
          items={shown}
          height={26}
          class="tree"
          show={at}
          attributes={{
            role: "tree",
            "aria-label": "Files of the workspace",
            tabIndex: 0,
            "aria-activedescendant": at < 0 ? undefined : `tree-${at}`,
            onKeyDown: keys,
            // by the key for it, or beside the rows
            onContextMenu: (event: MouseEvent) => menu(event, rows[at]),
            ...(writes ? dropping(current, () => ".") : {}),
          }}
          row={(item) => (
            <TreeRow
              key={"path" in item ? item.path : "draft"}
              item={item}
              index={"path" in item ? rows.indexOf(item) : -1}
              current={current}
              onOpen={open}
              onMenu={menu}
            />
          )}
        />
      )}
      {replacing.value !== null && <Replacing asked={replacing.value} current={current} />}
      {removing.value !== null && <Removing path={removing.value} current={current} />}
    </section>
  );
}

/** Returns the folder that a row stands for: itself, or the one that it is in. */
function folderOf(row: Row | undefined): string {
  if (row === undefined) return ".";
  return row.entry.type === "directory" ? row.path : parent(row.path);
}

type Shown = Row | { readonly draft: Draft; readonly depth: number };

function withDraft(rows: readonly Row[], draft: Draft | null): readonly Shown[] {
  if (draft === null) return rows;
  if (draft.kind === "rename") {
    return rows.map((row) => (row.path === draft.from ? { draft, depth: row.depth } : row));
  }
  const at = rows.findIndex(({ path }) => path === draft.folder);
  const depth = at < 0 ? 0 : (rows[at]?.depth ?? 0) + 1;
  return [...rows.slice(0, at + 1), { draft, depth }, ...rows.slice(at + 1)];
}

function treeMenu(
  current: Workspace,
  row: Row | undefined,
  begin: (kind: "file" | "directory") => void,
  open: (row: Row) => void,
): readonly MenuItem[] {
  const writes = allows("files:write");
  const items: MenuItem[] = [];
  const file = row !== undefined && row.entry.type === "file";
  if (row !== undefined) items.push({ label: "Open", icon: "file", run: () => open(row) });
  if (writes) {
    items.push({ label: "New file", icon: "file-plus", run: () => begin("file") });
    items.push({ label: "New folder", icon: "folder-plus", run: () => begin("directory") });
    const where = folderOf(row);
    items.push({ label: "Upload files", icon: "upload", run: () => choose(current, where) });
  }
  if (row === undefined) return items;
  if (writes) {
    const rename = () => {
      current.tree.draft.value = { folder: parent(row.path), kind: "rename", from: row.path };
    };
    items.push({ label: "Rename", icon: "pencil", run: rename });
  }
  if (file) items.push({ label: "Download", icon: "download", run: () => download(current, row.path) });
  items.push({ label: "Copy the path", icon: "copy", run: () => copy(row.path) });
  if (writes) {
    const remove = () => {
      removing.value = row.path;
    };
    items.push({ label: "Delete", icon: "trash", danger: true, run: remove });
  }
  return items;
}

function download(current: Workspace, path: string): void {
  const link = document.createElement("a");
  const slot = gateway.slot === null ? "" : `?slot=${gateway.slot}`;
  const encoded = path.split("/").map(encodeURIComponent).join("/");
  link.href = `/v1/tenants/${encodeURIComponent(current.name)}/files/${encoded}${slot}`;
  link.download = basename(path);
  link.click();
}

function TreeRow(props: {
  item: Shown;
  index: number;
  current: Workspace;
  onOpen: (row: Row) => void;
  onMenu: (event: MouseEvent, row: Row) => void;
}) {
  const { item, current } = props;
  const indent = { paddingLeft: `${8 + item.depth * 14}px` };
  if ("draft" in item) return <Naming draft={item.draft} indent={indent} current={current} />;
  const { tree, documents } = current;
  const folder = item.entry.type === "directory";
  const doc = documents.tabs.find(item.path);
  const at = tree.touched.value.get(item.path) ?? 0;
  const fresh = Date.now() - at < FRESH;
  const classes = [
    "tree-row",
    tree.selected.value === item.path && "selected",
    documents.tabs.active.value?.path === item.path && "shown",
    /^(node_modules|\.git|\.gateway)$/.test(item.name) && "faint",
    folder && over.value === item.path && "over",
  ];
  return (
    // biome-ignore lint/a11y/useKeyWithClickEvents: the tree takes the keys, as its role asks
    <div
      id={`tree-${props.index}`}
      class={classes.filter(Boolean).join(" ")}
      role="treeitem"
      tabIndex={-1}
      aria-level={item.depth + 1}
      aria-selected={tree.selected.value === item.path}
      aria-expanded={folder ? item.open : undefined}
      style={indent}
      title={item.entry.target === undefined ? item.path : `${item.path} → ${item.entry.target ?? "outside"}`}
      draggable={allows("files:write")}
      onDragStart={(event) => event.dataTransfer?.setData(PATH, item.path)}
      {...(allows("files:write") ? dropping(current, () => folderOf(item)) : {})}
      onContextMenu={(event) => {
        event.stopPropagation();
        props.onMenu(event, item);
      }}
      onClick={() => props.onOpen(item)}
    >
      <span class="twist">
        {folder && <Icon name={item.open ? "chevron-down" : "chevron-right"} size={13} />}
      </span>
      <FileIcon path={item.path} folder={folder} open={item.open} />
      <span class="name">{item.name}</span>
      {item.entry.type === "symlink" && <Icon name="link" size={11} />}
      {item.loading && <Spinner />}
      {doc?.dirty.value && <span class="mark dirty" title="Unsaved changes" />}
      {fresh && !doc?.dirty.value && (
        <span
          class="mark fresh"
          key={at}
          title="Changed just now"
          style={{ animationDelay: `${at - Date.now()}ms` }}
        />
      )}
    </div>
  );
}

function Naming({
  draft,
  indent,
  current,
}: {
  draft: Draft;
  indent: { paddingLeft: string };
  current: Workspace;
}) {
  const { tree, documents } = current;
  const input = useRef<HTMLInputElement>(null);
  const done = useRef(false);
  const initial = draft.from === undefined ? "" : basename(draft.from);
  // at once: the next key is for the name already
  useLayoutEffect(() => {
    input.current?.focus();
    const dot = initial.lastIndexOf(".");
    input.current?.setSelectionRange(0, dot > 0 ? dot : initial.length);
  }, [initial]);
  const end = async (take: boolean) => {
    if (done.current) return;
    done.current = true;
    const name = input.current?.value.trim() ?? "";
    tree.draft.value = null;
    if (!take || name === "" || name === initial || !current.reachable) return;
    try {
      if (draft.kind === "rename" && draft.from !== undefined) {
        const to = join(parent(draft.from), name);
        await documents.move(draft.from, to, tree.move(draft.from, to));
      } else if (draft.kind !== "rename") {
        const path = join(draft.folder, name);
        await tree.create(path, draft.kind);
        if (draft.kind === "file") void documents.show(path);
      }
    } catch (error) {
      refused(error, name);
    }
  };
  return (
    <div class="tree-row naming" style={indent}>
      <span class="twist" />
      <FileIcon path={initial || "new"} folder={draft.kind === "directory"} />
      <input
        ref={input}
        aria-label={
          draft.kind === "rename"
            ? "New name"
            : `Name of the new ${draft.kind === "file" ? "file" : "folder"}`
        }
        defaultValue={initial}
        spellcheck={false}
        onKeyDown={(event) => {
          event.stopPropagation();
          if (event.key === "Enter") void end(true);
          if (event.key === "Escape") void end(false);
        }}
        onBlur={() => void end(true)}
      />
    </div>
  );
}

/** Asks before a file or folder is deleted, and says what can be had back. */
export function Removing({ path, current }: { path: string; current: Workspace }) {
  const [kept, setKept] = useState<boolean | null>(null);
  useEffect(() => {
    current.tenant.history.list({ limit: 1 }).then(
      ({ turns }) => setKept(turns.length > 0),
      () => setKept(false), // it is off, or cannot be asked
    );
  }, [current]);
  const close = () => {
    removing.value = null;
  };
  const name = basename(path);
  const inside = current.documents.tabs.open.value.filter((doc) => within(doc.path, path));
  const unsaved = inside.filter(({ dirty }) => dirty.value).map((doc) => doc.name);
  const folder = current.tree.rows.value.find((row) => row.path === path)?.entry.type === "directory";
  const online = current.status.value.state === "open";
  return (
    <Dialog label={`Delete ${name}`} class="small" onClose={close}>
      <h2>Delete {name}?</h2>
      <p>
        <code>{path}</code> is deleted at once{folder ? ", with everything in it" : ""}.
      </p>
      {unsaved.length > 0 && (
        <p>
          <b>
            {unsaved.slice(0, 3).join(", ")}
            {unsaved.length > 3 && ` and ${unsaved.length - 3} more`}
          </b>{" "}
          {unsaved.length === 1 ? "has" : "have"} unsaved changes, which are not in History.
        </p>
      )}
      <p>
        {kept === false
          ? "There is no History of this tenant. Only a snapshot can bring it back."
          : "History keeps the text that it recorded last; ignored files, such as node_modules, are not in it."}
      </p>
      {!online && <p role="alert">The gateway cannot be reached now. Delete it once it can.</p>}
      <footer>
        <button type="button" onClick={close}>
          Cancel
        </button>
        <button
          type="button"
          class="danger"
          disabled={!online}
          onClick={() => {
            close();
            current.documents
              .remove(path, current.tree.remove(path))
              .catch((error) => complain(error, `Deleting ${name}`));
          }}
        >
          Delete
        </button>
      </footer>
    </Dialog>
  );
}
