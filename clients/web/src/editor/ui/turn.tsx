/** One turn of an agent as a diff, file by file, over the whole window. */

import type { TurnChanges } from "@incus-gateway/client";
import { signal, useSignal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import type { UndoConflict as Conflict } from "../state/history.js";
import { area } from "../state/layout.js";
import { type PatchFile, type PatchLine, readPatch } from "../state/patch.js";
import { allows } from "../state/session.js";
import type { Workspace } from "../state/workspace.js";
import { clock, Dialog, FileIcon, Icon } from "./parts.js";

/** The turn that is looked at so. */
export const looking = signal<TurnChanges | null>(null);

/** How many lines are drawn: more would make the page slow, and nobody reads them. */
const MOST = 4000;

export function TurnDiff({ turn, current }: { turn: TurnChanges; current: Workspace }) {
  const { history } = current;
  const files = useMemo(() => readPatch(turn.diff), [turn]);
  const first = history.turns.value.at(-1)?.turn === turn.turn && !history.more.value;
  const close = () => {
    looking.value = null;
  };
  const go = (way: "undo" | "restore") => {
    close();
    void history[way](turn.turn);
  };
  let left = MOST;
  const shown = files.flatMap((file) => {
    const lines = file.hunks.reduce((sum, hunk) => sum + hunk.lines.length, 0);
    left -= lines;
    return left < 0 ? [] : [file];
  });
  const [title = "", ...rest] = turn.title.split("\n");
  return (
    <Dialog label={`Turn: ${title}`} class="turn-view" onClose={close}>
      <header>
        <Icon name="git-compare" />
        <div>
          <h2>{title}</h2>
          <p class="where">
            {turn.agent || turn.by} · <time>{clock(turn.at * 1000)}</time> · {turn.files}{" "}
            {turn.files === 1 ? "file" : "files"} · <span class="plus">+{turn.added}</span>{" "}
            <span class="minus">−{turn.removed}</span>
          </p>
        </div>
      </header>
      {/* biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keys */}
      <section class="turn-patch" tabIndex={0} aria-label="Changes">
        {rest.length > 0 && <p class="turn-asked">{rest.join("\n").trim()}</p>}
        {shown.map((file) => (
          <FileDiff
            key={file.path}
            file={file}
            open={() => {
              const line = file.hunks[0]?.lines.find(({ kind }) => kind !== "same")?.after;
              close();
              void current.documents.show(file.path, line ? { line } : undefined);
              area.value = "editor";
            }}
          />
        ))}
        {(turn.truncated || shown.length < files.length) && (
          <p class="where">The rest is too long to show.</p>
        )}
        {files.length === 0 && <p class="where">No lines changed.</p>}
      </section>
      <footer>
        <button type="button" onClick={close}>
          Close
        </button>
        <span class="grow" />
        {allows("files:write") && (
          <>
            <button type="button" disabled={history.busy.value} onClick={() => go("restore")}>
              Go back to here
            </button>
            {!first && (
              <button type="button" disabled={history.busy.value} onClick={() => go("undo")}>
                Undo this turn
              </button>
            )}
          </>
        )}
      </footer>
    </Dialog>
  );
}

/** Asks whether files that were changed since in the same lines become what they were before the turn. */
export function UndoConflict({ conflict, current }: { conflict: Conflict; current: Workspace }) {
  const { history } = current;
  const chosen = useSignal<ReadonlySet<string>>(new Set());
  const close = () => {
    history.conflict.value = null;
  };
  return (
    <Dialog label="Undo conflicts" class="small" onClose={close}>
      <h2>These files changed since in the same lines</h2>
      <p>
        Nothing was changed. Choose the files that become what they were before the turn; the changes made
        since stay in the history, and this can be undone.
      </p>
      <ul class="undo-paths">
        {conflict.paths.map((path) => (
          <li key={path}>
            <label>
              <input
                type="checkbox"
                checked={chosen.value.has(path)}
                onChange={() => {
                  const others = [...chosen.value].filter((one) => one !== path);
                  chosen.value = new Set(chosen.value.has(path) ? others : [...others, path]);
                }}
              />{" "}
              <code>{path}</code>
            </label>
          </li>
        ))}
      </ul>
      <footer>
        <button type="button" onClick={close}>
          Cancel
        </button>
        <button
          type="button"
          class="danger"
          disabled={chosen.value.size < conflict.paths.length}
          onClick={() => void history.undo(conflict.turn, conflict.paths)}
        >
          Undo these too
        </button>
      </footer>
    </Dialog>
  );
}

function FileDiff({ file, open }: { file: PatchFile; open: () => void }) {
  return (
    <article aria-label={file.path}>
      <h3>
        <FileIcon path={file.path} />
        <button type="button" onClick={open} title="Open the file">
          {file.path}
        </button>
        {file.note !== null && <span class="badge">{file.note}</span>}
      </h3>
      {file.hunks.map((hunk, index) => (
        <table key={index}>
          <tbody>
            {index > 0 && (
              <tr class="place">
                <td colSpan={3}>{hunk.heading || "…"}</td>
              </tr>
            )}
            {hunk.lines.map((line, at) => (
              <Line key={at} line={line} />
            ))}
          </tbody>
        </table>
      ))}
    </article>
  );
}

const SIGNS = { same: " ", added: "+", removed: "−", note: "" } as const;

function Line({ line }: { line: PatchLine }) {
  return (
    <tr class={line.kind}>
      <td class="number">{line.before ?? ""}</td>
      <td class="number">{line.after ?? ""}</td>
      <td class="code">
        <span class="sign">{SIGNS[line.kind]}</span>
        {line.text}
      </td>
    </tr>
  );
}
