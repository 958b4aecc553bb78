/** The search panel. */

import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { area } from "../state/layout.js";
import { basename, parent } from "../state/paths.js";
import type { Match } from "../state/search.js";
import { allows } from "../state/session.js";
import { complain, say } from "../state/toasts.js";
import type { Workspace } from "../state/workspace.js";
import { Dialog, Empty, FileIcon, IconButton, Spinner } from "./parts.js";

/** Grows whenever the field is to take the focus. */
export const focusSearch = signal(0);
/** Whether it is asked if all that was found is to be replaced. */
const asking = signal(false);
const folded = signal<ReadonlySet<string>>(new Set());

export function SearchView({ current }: { current: Workspace }) {
  const { search } = current;
  const input = useRef<HTMLInputElement>(null);
  const timer = useRef<ReturnType<typeof setTimeout>>(undefined);
  const wish = focusSearch.value;
  useEffect(() => {
    input.current?.focus();
    input.current?.select();
  }, [wish]);
  const later = () => {
    clearTimeout(timer.current);
    timer.current = setTimeout(() => void search.run(), 180);
  };
  const found = search.found.value;
  const show = (match: Match) => {
    const at = search.regex.value ? -1 : match.text.toLowerCase().indexOf(search.query.value.toLowerCase());
    void current.documents.show(match.path, { line: match.line, column: Math.max(1, at + 1) });
    area.value = "editor";
  };
  return (
    <section class="side-view search" aria-label="Search">
      <header>
        <h2>Search</h2>
        <span class="grow" />
        {search.busy.value && <Spinner label="Searching" />}
        {allows("files:write") && (
          <IconButton
            icon="replace"
            label="Replace in files"
            pressed={search.replacing.value}
            onClick={() => {
              search.replacing.value = !search.replacing.value;
            }}
          />
        )}
      </header>
      <div class="search-fields">
        <div class="field">
          <input
            ref={input}
            type="search"
            placeholder="Search all files"
            aria-label="Search all files"
            value={search.query.value}
            spellcheck={false}
            onInput={(event) => {
              search.query.value = event.currentTarget.value;
              later();
            }}
            onKeyDown={(event) => event.key === "Enter" && void search.run()}
          />
          <IconButton
            icon="case-sensitive"
            label="Match case"
            pressed={search.matchCase.value}
            onClick={() => {
              search.matchCase.value = !search.matchCase.value;
              void search.run();
            }}
          />
          <IconButton
            icon="regex"
            label="Regular expression"
            pressed={search.regex.value}
            onClick={() => {
              search.regex.value = !search.regex.value;
              void search.run();
            }}
          />
        </div>
        {search.replacing.value && (
          <div class="field">
            <input
              placeholder="Replace with"
              aria-label="Replace with"
              value={search.replacement.value}
              spellcheck={false}
              onInput={(event) => {
                search.replacement.value = event.currentTarget.value;
              }}
            />
            <IconButton
              icon="replace"
              label="Replace all matches"
              disabled={found === null || found.total === 0 || search.busy.value}
              onClick={() => {
                asking.value = true;
              }}
            />
          </div>
        )}
        <div class="field">
          <input
            placeholder="In files, such as *.tsx"
            aria-label="In files"
            value={search.include.value}
            spellcheck={false}
            onInput={(event) => {
              search.include.value = event.currentTarget.value;
              later();
            }}
          />
        </div>
      </div>
      <div class="found" aria-live="polite">
        {search.failure.value !== null ? (
          <p class="problem">{search.failure.value}</p>
        ) : found === null ? (
          <p class="hint">
            Every file of the workspace, except what git ignores and what was built or installed.
          </p>
        ) : found.total === 0 ? (
          <p class="hint">Nothing found.</p>
        ) : (
          <>
            <p class="hint">
              {found.total} {found.total === 1 ? "line" : "lines"} in {found.files.length}{" "}
              {found.files.length === 1 ? "file" : "files"}
              {found.truncated && "; there are more"}
            </p>
            {found.files.map(({ path, matches }) => {
              const closed = folded.value.has(path);
              return (
                <div class="found-file" key={path}>
                  <button
                    type="button"
                    class="found-name"
                    aria-expanded={!closed}
                    title={path}
                    onClick={() => {
                      const next = new Set(folded.value);
                      if (closed) next.delete(path);
                      else next.add(path);
                      folded.value = next;
                    }}
                  >
                    <FileIcon path={path} />
                    <span class="name">{basename(path)}</span>
                    <span class="where">{parent(path) === "." ? "" : parent(path)}</span>
                    <span class="count">{matches.length}</span>
                  </button>
                  {!closed &&
                    matches.map((match) => (
                      <button type="button" class="found-line" key={match.line} onClick={() => show(match)}>
                        <span class="number">{match.line}</span>
                        <Line text={match.text} query={search.query.value} plain={!search.regex.value} />
                      </button>
                    ))}
                </div>
              );
            })}
          </>
        )}
        {found === null && search.failure.value === null && search.query.value === "" && (
          <Empty icon="search" title="Search by Grep">
            Runs on the host, beside the container: thousands of files in milliseconds.
          </Empty>
        )}
      </div>
      {asking.value && <Replacing current={current} />}
    </section>
  );
}

function Replacing({ current }: { current: Workspace }) {
  const { search } = current;
  const found = search.found.value;
  const close = () => {
    asking.value = false;
  };
  const replace = async () => {
    close();
    try {
      const { files, places, failed } = await search.replace();
      say(
        `Replaced ${places} ${places === 1 ? "match" : "matches"} in ${files} ${files === 1 ? "file" : "files"}.`,
      );
      for (const { path, why } of failed.slice(0, 3)) say(`${path} was not changed: ${why}`, "error");
    } catch (error) {
      complain(error, "Replacing");
    }
  };
  const count = found?.files.length ?? 0;
  return (
    <Dialog label="Replace in files" class="small" onClose={close}>
      <h2>
        Replace in {count} {count === 1 ? "file" : "files"}?
      </h2>
      <p>
        <code>{search.query.value}</code> becomes <code>{search.replacement.value || "nothing"}</code>{" "}
        wherever it was found in the listed files, at once.
        {found?.truncated && " There are more files, which are not changed."} Unsaved changes in open files
        stay unsaved.
      </p>
      <footer>
        <button type="button" onClick={close}>
          Cancel
        </button>
        <button type="button" class="primary" onClick={() => void replace()}>
          Replace
        </button>
      </footer>
    </Dialog>
  );
}

function Line({ text, query, plain }: { text: string; query: string; plain: boolean }) {
  const line = text.trimStart().slice(0, 300);
  const at = plain ? line.toLowerCase().indexOf(query.toLowerCase()) : -1;
  if (at < 0) return <code>{line}</code>;
  const start = Math.max(0, at - 24);
  return (
    <code>
      {start > 0 && "…"}
      {line.slice(start, at)}
      <mark>{line.slice(at, at + query.length)}</mark>
      {line.slice(at + query.length)}
    </code>
  );
}
