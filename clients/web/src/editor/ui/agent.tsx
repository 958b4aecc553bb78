/** The prompt box: a conversation with the operator's agent, as it works. */

import { createRef } from "preact";
import { useLayoutEffect, useRef } from "preact/hooks";
import type { Call, Said } from "../state/conversation.js";
import { area, panelOpen } from "../state/layout.js";
import { basename, relative } from "../state/paths.js";
import { complain } from "../state/toasts.js";
import type { Workspace } from "../state/workspace.js";
import { useMarkdown } from "./looks.js";
import { Empty, Icon, IconButton, Spinner } from "./parts.js";
import { looking } from "./turn.js";

const box = createRef<HTMLTextAreaElement>();

export function focusAgent(): void {
  // once the view exists
  requestAnimationFrame(() => box.current?.focus());
}

export function AgentView({ current }: { current: Workspace }) {
  const { agent } = current;
  const said = agent.said.value;
  const running = agent.running.value;
  const list = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  const follow = () => {
    if (list.current !== null && follows.current) list.current.scrollTop = list.current.scrollHeight;
  };
  useLayoutEffect(follow, [said, running]);
  return (
    <section class="side-view agent" aria-label="Agent">
      <header>
        <h2>Agent</h2>
        <span class="grow" />
        <IconButton
          icon="plus"
          label="New conversation"
          disabled={said.length === 0 && !running}
          onClick={() => {
            agent.clear();
            focusAgent();
          }}
        />
      </header>
      <div
        ref={list}
        class="conversation scroll"
        role="log"
        // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keys
        tabIndex={0}
        aria-label="Conversation"
        onScroll={({ currentTarget: { scrollTop, scrollHeight, clientHeight } }) => {
          follows.current = scrollHeight - scrollTop - clientHeight < 40;
        }}
      >
        {said.length === 0 && (
          <Empty icon="bot" title="Ask for a change">
            The agent works in {current.name}: it reads and writes its files and runs commands. What it
            changed can be undone.
          </Empty>
        )}
        {said.map((one, index) => (
          <Part key={index} said={one} current={current} onShown={follow} />
        ))}
      </div>
      <Prompt current={current} />
    </section>
  );
}

function Prompt({ current }: { current: Workspace }) {
  const { agent } = current;
  const running = agent.running.value;
  const now = agent.said.value.findLast((one): one is Call => one.kind === "call" && one.state === "running");
  const status = !running ? "" : agent.thinking.value ? "Thinking…" : now ? `${now.name}…` : "Working…";
  return (
    <form
      class="prompt"
      onSubmit={(event) => {
        event.preventDefault();
        void agent.ask();
      }}
    >
      <div class="prompt-state" role="status">
        {running && <Icon name="loader-circle" size={13} />}
        <span>{status}</span>
      </div>
      <textarea
        ref={box}
        rows={3}
        aria-label="Ask the agent"
        aria-describedby="prompt-keys"
        placeholder="Ask for a change"
        value={agent.draft.value}
        onInput={(event) => {
          agent.draft.value = event.currentTarget.value;
        }}
        onKeyDown={(event) => {
          if (event.isComposing) return;
          if (event.key === "Escape" && running) agent.stop();
          if (event.key !== "Enter" || event.shiftKey) return;
          event.preventDefault();
          void agent.ask();
        }}
      />
      <div class="prompt-ways">
        <span class="hint" id="prompt-keys">
          {running ? "Esc stops it" : "Enter sends, Shift-Enter starts a new line"}
        </span>
        <span class="grow" />
        {running ? (
          <button type="button" class="danger" onClick={() => agent.stop()}>
            Stop
          </button>
        ) : (
          <button type="submit" class="primary" disabled={agent.draft.value.trim() === ""}>
            Send
          </button>
        )}
      </div>
    </form>
  );
}

function Part({ said, current, onShown }: { said: Said; current: Workspace; onShown: () => void }) {
  switch (said.kind) {
    case "asked":
      return (
        <div class="asked">
          <span class="unseen">You: </span>
          {said.text}
        </div>
      );
    case "text":
      return <Answer text={said.text} live={said.live} onShown={onShown} />;
    case "call":
      return <CallRow call={said} current={current} />;
    case "turn":
      return (
        <button type="button" class="changed" onClick={() => void show(current, said.turn)}>
          <Icon name="git-compare" size={14} />
          <span>
            See what it changed <span class="where">{said.what}</span>
          </span>
        </button>
      );
    case "note":
      return (
        <p class={said.bad ? "problem" : "where"} role={said.bad ? "alert" : undefined}>
          {said.text}
        </p>
      );
  }
}

/** Growing text is read out once it is complete, not word by word. */
function Answer({ text, live, onShown }: { text: string; live: boolean; onShown: () => void }) {
  const page = useMarkdown(text);
  useLayoutEffect(onShown, [page]);
  const shown = page ?? <p class="plain">{text}</p>;
  return (
    <div class="answer" aria-busy={live}>
      {shown}
    </div>
  );
}

const STATES = { running: "Running", done: "Done", failed: "Failed", stopped: "Stopped" } as const;

function CallRow({ call, current }: { call: Call; current: Workspace }) {
  const workspace = current.server.value?.workspace ?? "/srv/site";
  const path = call.path === null ? null : relative(call.path, workspace);
  return (
    <details class={`call ${call.state} ${call.nested ? "nested" : ""}`}>
      <summary>
        {call.state === "running" ? (
          <Spinner label={STATES.running} />
        ) : (
          <Icon name={call.state === "done" ? "check" : "circle-alert"} size={14} />
        )}
        <span class="call-what">
          <b>{call.name}</b> <code>{path === null ? call.what : basename(path)}</code>
          {call.state !== "done" && <span class="unseen"> {STATES[call.state]}</span>}
        </span>
      </summary>
      <p class="call-ways">
        {path !== null && path !== "." && (
          <button
            type="button"
            onClick={() => {
              void current.documents.show(path);
              area.value = "editor";
            }}
          >
            Open {path}
          </button>
        )}
        {call.exec !== null && (
          <button
            type="button"
            onClick={() => {
              current.terminals.watch(call.exec ?? "", call.what.slice(0, 24));
              panelOpen.value = true;
              area.value = "panel";
            }}
          >
            Show its output
          </button>
        )}
      </p>
      {path === null && call.what !== "" && <pre>{call.what}</pre>}
      {call.said !== "" && <pre>{call.said}</pre>}
    </details>
  );
}

async function show(current: Workspace, turn: string): Promise<void> {
  try {
    await current.history.look(); // only then it is known which turn is the first
    looking.value = await current.tenant.history.turn(turn);
  } catch (error) {
    complain(error, "What the agent changed");
  }
}
