/** One turn of an agent as a diff, file by file, over the whole window. */

import type { TurnChanges } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { useMemo } from "preact/hooks";
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
  const go = (to: "before" | "after") => {
    close();
    void history.restore(turn.turn, to);
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
            <button type="button" disabled={history.busy.value} onClick={() => go("after")}>
              Go back to here
            </button>
            {!first && (
              <button
                type="button"
                class="primary"
                disabled={history.busy.value}
                onClick={() => go("before")}
              >
                Undo this turn
              </button>
            )}
          </>
        )}
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
