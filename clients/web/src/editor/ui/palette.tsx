/** The palette: open files by name, run commands, switch tenants. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { available, palette, shown } from "../state/commands.js";
import { score } from "../state/fuzzy.js";
import { area } from "../state/layout.js";
import { basename, parent } from "../state/paths.js";
import { tenants, type Workspace } from "../state/workspace.js";
import { Dialog, FileIcon, Icon, Key, Spinner } from "./parts.js";
import { switchTenant } from "./top-bar.js";

interface Choice {
  readonly id: string;
  readonly title: string;
  readonly detail?: string;
  readonly keys?: string | undefined;
  readonly file?: string;
  readonly status?: string;
  run(): void;
}

export function Palette({ current }: { current: Workspace | null }) {
  const asked = palette.value;
  const [query, setQuery] = useState(asked?.initial ?? "");
  const [at, setAt] = useState(0);
  /** The files that were found, and for which name. */
  const [found, setFound] = useState<{ readonly name: string; readonly paths: readonly string[] } | null>(
    null,
  );
  const [entered, setEntered] = useState(false);
  const list = useRef<HTMLDivElement>(null);
  const mode = asked?.mode === "tenants" ? "tenants" : query.startsWith(">") ? "commands" : "files";
  const wanted = (mode === "commands" ? query.slice(1) : query).trim();
  const [name = "", line] = mode === "files" ? wanted.split(/:(?=\d*$)/) : [wanted];

  useEffect(() => {
    if (mode !== "files" || current === null) return;
    const ending = new AbortController();
    const timer = setTimeout(async () => {
      try {
        const paths = name === "" ? [] : await current.files.find(name);
        if (!ending.signal.aborted) setFound({ name, paths });
      } catch {
        if (!ending.signal.aborted) setFound({ name, paths: [] });
      }
    }, 60);
    return () => {
      clearTimeout(timer);
      ending.abort();
    };
  }, [mode, name, current]);

  const close = () => {
    palette.value = null;
  };
  const known = tenants.value; // requested each time this opens
  const choices = useMemo<readonly Choice[]>(() => {
    if (mode === "tenants") {
      return known
        .filter((tenant) => score(tenant.name, wanted) > 0)
        .map((tenant) => ({
          id: tenant.name,
          title: tenant.name,
          detail: tenant.domain ?? "",
          status: tenant.status,
          run: () => switchTenant(tenant.name),
        }));
    }
    if (mode === "commands") {
      return available()
        .map((command) => ({ command, points: score(command.title, wanted) }))
        .filter(({ points }) => points > 0)
        .sort((a, b) => (wanted === "" ? 0 : b.points - a.points))
        .map(({ command }) => ({
          id: command.id,
          title: command.title,
          keys: command.keys ?? command.textKeys,
          run: () => command.run(),
        }));
    }
    const tabs = current?.documents.tabs;
    if (name === "" && line !== undefined) {
      const path = tabs?.current.value?.path;
      if (path === undefined || line === "") return [];
      const run = () => void current?.documents.show(path, { line: Number(line) });
      return [{ id: "line", title: `Go to line ${line}`, detail: basename(path), run }];
    }
    const open = tabs?.open.value.map(({ path }) => path) ?? [];
    const paths = name === "" ? open : (found?.paths ?? []);
    return paths.map((path) => ({
      id: path,
      title: basename(path),
      detail: parent(path) === "." ? "" : parent(path),
      file: path,
      run: () => {
        void current?.documents.show(path, line ? { line: Number(line) } : undefined);
        area.value = "editor";
      },
    }));
  }, [mode, wanted, name, line, found, current, known]);
  const chosen = Math.min(at, Math.max(0, choices.length - 1));
  useEffect(() => {
    list.current?.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
  }, [chosen, choices]);

  const run = (choice: Choice | undefined) => {
    if (choice === undefined) return;
    close();
    queueMicrotask(() => choice.run());
  };
  // earlier results are for another name
  const looking = mode === "files" && name !== "" && found?.name !== name;
  useEffect(() => {
    if (!entered || looking) return;
    setEntered(false);
    run(choices[chosen]);
  }, [entered, looking]);
  const hint = {
    files: "Find a file by its name, or type > for commands, : for a line",
    commands: "Run a command",
    tenants: "Open a tenant",
  };
  return (
    <Dialog label={hint[mode]} class="palette" onClose={close}>
      <div class="palette-field">
        <Icon name={mode === "commands" ? "command" : mode === "tenants" ? "server" : "search"} size={16} />
        <input
          role="combobox"
          aria-expanded="true"
          aria-controls="choices"
          aria-activedescendant={choices.length > 0 ? `choice-${chosen}` : undefined}
          aria-label={hint[mode]}
          placeholder={hint[mode]}
          spellcheck={false}
          autocomplete="off"
          value={query}
          autofocus
          onInput={(event) => {
            setQuery(event.currentTarget.value);
            setAt(0);
            setEntered(false);
          }}
          onKeyDown={(event) => {
            const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
            if (step !== undefined) {
              event.preventDefault();
              setAt((chosen + step + choices.length) % Math.max(1, choices.length));
            } else if (event.key === "Enter") {
              event.preventDefault();
              setEntered(true);
            }
          }}
        />
        {looking && <Spinner label="Searching" />}
      </div>
      <div class="choices" id="choices" role="listbox" aria-label={hint[mode]} ref={list}>
        {choices.map((choice, index) => (
          // biome-ignore lint/a11y/useKeyWithClickEvents: the field takes the keys
          <div
            key={choice.id}
            id={`choice-${index}`}
            class="choice"
            role="option"
            tabIndex={-1}
            aria-selected={index === chosen}
            onMouseMove={() => setAt(index)}
            onClick={() => run(choice)}
          >
            {choice.file !== undefined && <FileIcon path={choice.file} />}
            {choice.status !== undefined && <span class={`lamp ${choice.status}`} />}
            <span class="name">{choice.title}</span>
            {choice.detail && <span class="where">{choice.detail}</span>}
            <span class="grow" />
            {choice.keys !== undefined && <Key>{shown(choice.keys)}</Key>}
          </div>
        ))}
        {choices.length === 0 && (
          <p class="hint">
            {mode !== "files"
              ? `No ${mode === "commands" ? "command" : "tenant"} has that name.`
              : name === ""
                ? line === undefined
                  ? "Type part of a file name."
                  : "Type a line number."
                : !looking
                  ? "No file has that name."
                  : current?.status.value.state === "open"
                    ? "Searching…"
                    : "Files are searched once the gateway can be reached."}
          </p>
        )}
      </div>
    </Dialog>
  );
}
