/** The turns of agents: a list, what each changed, and the way back. */

import type { Turn, TurnChanges } from "@incus-gateway/client";
import { useEffect } from "preact/hooks";
import { area } from "../state/layout.js";
import { allows } from "../state/session.js";
import type { Workspace } from "../state/workspace.js";
import { clock, Empty, Icon, IconButton, Spinner } from "./parts.js";
import { looking } from "./turn.js";

export function HistoryView({ current }: { current: Workspace }) {
  const { history } = current;
  const turns = history.turns.value;
  const failure = history.failure.value;
  useEffect(() => {
    void history.look();
  }, [history]);
  return (
    <section class="side-view history" aria-label="History">
      <header>
        <h2>History</h2>
        <span class="grow" />
        {history.busy.value && <Spinner label="Asking" />}
        <IconButton icon="refresh-cw" label="Load again" onClick={() => void history.look()} />
      </header>
      {failure !== null && (
        <p class="turn-failure" role="alert">
          {failure}
        </p>
      )}
      {turns.length === 0 && failure === null && !history.busy.value ? (
        <Empty icon="undo" title="No turns yet">
          What an agent changes appears here when its turn ends, and can be undone.
        </Empty>
      ) : (
        <div class="scroll">
          <ol class="turns" aria-label="Turns, latest first">
            {turns.map((turn) => (
              <TurnRow key={turn.turn} turn={turn} current={current} />
            ))}
          </ol>
          {history.more.value && (
            <button type="button" class="turn-more" onClick={() => void history.older()}>
              Show older turns
            </button>
          )}
        </div>
      )}
    </section>
  );
}

function TurnRow({ turn, current }: { turn: Turn; current: Workspace }) {
  const { history } = current;
  const open = history.open.value === turn.turn;
  const shown = history.shown.value;
  return (
    <li class="turn">
      <button
        type="button"
        class="event"
        aria-expanded={open}
        title={turn.title}
        onClick={() => void history.toggle(turn.turn)}
      >
        <span class="event-icon">
          <Icon name={turn.kind === "restored" ? "undo" : turn.kind === "turn" ? "bot" : "save"} size={14} />
        </span>
        <span class="event-text">
          <span class="event-what">
            <b>{turn.title.split("\n")[0]}</b>
          </span>
          <span class="event-facts">
            <time dateTime={new Date(turn.at * 1000).toISOString()}>{clock(turn.at * 1000)}</time>
            <span class="who">{turn.agent || turn.by}</span>
            <span>
              {turn.files} {turn.files === 1 ? "file" : "files"}
            </span>
          </span>
        </span>
        <span class="event-end">
          <span class="ms">
            +{turn.added} −{turn.removed}
          </span>
        </span>
      </button>
      {open && shown !== null && shown.turn === turn.turn && <Changes turn={shown} current={current} />}
    </li>
  );
}

function Changes({ turn, current }: { turn: TurnChanges; current: Workspace }) {
  const { history } = current;
  const may = allows("files:write");
  const first = history.turns.value.at(-1)?.turn === turn.turn && !history.more.value;
  return (
    <div class="turn-changes">
      {may && (
        <p class="turn-ways">
          {!first && (
            <button
              type="button"
              title="Takes back what this turn changed: later changes stay"
              disabled={history.busy.value}
              onClick={() => void history.undo(turn.turn)}
            >
              Undo this turn
            </button>
          )}
          <button
            type="button"
            title="Makes all files what they were right after this turn: later changes are taken back too"
            disabled={history.busy.value}
            onClick={() => void history.restore(turn.turn)}
          >
            Go back to here
          </button>
        </p>
      )}
      {turn.diff !== "" && (
        <button
          type="button"
          onClick={() => {
            looking.value = turn;
          }}
        >
          Open as a diff
        </button>
      )}
      {turn.leftOut.length > 0 && <p class="where">Left out: {turn.leftOut.join(", ")}</p>}
      <ul class="turn-files">
        {turn.changed.map(({ path, added, removed, binary }) => (
          <li key={path}>
            <button
              type="button"
              onClick={() => {
                void current.documents.show(path);
                area.value = "editor";
              }}
            >
              {path}
            </button>{" "}
            <span class="where">{binary ? "binary" : `+${added} −${removed}`}</span>
          </li>
        ))}
      </ul>
      {turn.diff !== "" && (
        // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keys
        <section class="turn-diff" tabIndex={0} aria-label="What changed">
          <pre>
            {turn.diff.split("\n").map((line, index) => (
              <span key={index} class={KINDS[line[0] ?? ""] ?? ""}>
                {line}
                {"\n"}
              </span>
            ))}
          </pre>
        </section>
      )}
      {turn.truncated && <p class="where">The rest of the patch is too long to show.</p>}
    </div>
  );
}

const KINDS: Readonly<Record<string, string>> = { "+": "added", "-": "removed", "@": "place", d: "file" };
