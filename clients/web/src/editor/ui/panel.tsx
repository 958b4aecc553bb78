/** The terminal panel: tabs and the visible terminal. */

import type { ExecInfo } from "@incus-gateway/client";
import { effect, signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { keysOf } from "../state/commands.js";
import { idle } from "../state/idle.js";
import { dark, panelHeight, panelOpen, phone } from "../state/layout.js";
import { load } from "../state/network.js";
import { allows, session } from "../state/session.js";
import type { Terminal } from "../state/terminals.js";
import { complain } from "../state/toasts.js";
import type { Workspace } from "../state/workspace.js";
import { Divider, Empty, Icon, IconButton, scrollAcross } from "./parts.js";

const others = signal<readonly ExecInfo[] | null>(null);
/** Whether the field to search in the terminal is there; it grows whenever it is to take the focus. */
export const finding = signal(0);

export function Panel({ current }: { current: Workspace }) {
  const { terminals } = current;
  const list = terminals.list.value;
  const active = terminals.active.value;
  const may = allows("exec");
  const height = phone.value ? undefined : { height: `${panelHeight.value}px` };
  return (
    <>
      <Divider
        label="Height of the terminals"
        value={panelHeight.value}
        min={96}
        max={() => window.innerHeight - 240}
        invert
        onChange={(value) => {
          panelHeight.value = value;
        }}
      />
      <section class="panel" aria-label="Terminals" style={height}>
        <header>
          <div class="panel-tabs" role="tablist" aria-label="Terminals" onWheel={scrollAcross}>
            {list.map((terminal) => (
              <TerminalTab key={terminal.key} terminal={terminal} current={current} />
            ))}
          </div>
          {may && (
            <IconButton
              icon="plus"
              label="New terminal"
              keys={keysOf("terminal.new")}
              onClick={() => terminals.open(true)}
            />
          )}
          {may && (
            <IconButton
              icon="link"
              label="Show a terminal that runs elsewhere"
              onClick={() =>
                void terminals
                  .others()
                  .then((found) => {
                    others.value = found;
                  })
                  .catch((error) => complain(error))
              }
            />
          )}
          <span class="grow" />
          {active !== null && (
            <IconButton
              icon="search"
              label="Search in the terminal"
              keys={keysOf("search")}
              onClick={() => {
                finding.value = finding.value === 0 ? 1 : 0;
              }}
            />
          )}
          {active?.state.value === "running" && !active.foreign && (
            <IconButton
              icon="octagon-x"
              label="Cancel: end the command and everything that it started"
              danger
              onClick={() => void terminals.cancel(active)}
            />
          )}
          <IconButton
            icon="chevron-down"
            label="Hide the terminals"
            keys={keysOf("terminal.toggle")}
            onClick={() => {
              panelOpen.value = false;
            }}
          />
        </header>
        {others.value !== null && <Others current={current} found={others.value} />}
        <div class="screens">
          {finding.value > 0 && active !== null && <Find terminal={active} />}
          {list.map((terminal) => (
            <TerminalView
              key={terminal.key}
              terminal={terminal}
              current={current}
              shown={terminal === active}
            />
          ))}
          {list.length === 0 && (
            <Empty icon="square-terminal" title={may ? "No terminal" : "No commands for this token"}>
              {may && (
                <button type="button" onClick={() => terminals.open(true)}>
                  New terminal
                </button>
              )}
            </Empty>
          )}
        </div>
        {phone.value && active !== null && !active.foreign && <Keys terminal={active} current={current} />}
      </section>
    </>
  );
}

function Find({ terminal }: { terminal: Terminal }) {
  const [text, setText] = useState("");
  const [found, setFound] = useState(true);
  const field = useRef<HTMLInputElement>(null);
  const wish = finding.value;
  // at once: the next key is for the field already
  useLayoutEffect(() => {
    field.current?.focus();
    field.current?.select();
  }, [wish]);
  const look = (typed: string, back: boolean) => setFound(terminal.screen?.find(typed, back) ?? false);
  const close = () => {
    finding.value = 0;
    terminal.screen?.focus();
  };
  return (
    <search class="terminal-find">
      <div class="field small">
        <input
          ref={field}
          aria-label="Search in the terminal"
          placeholder="Search in the terminal"
          spellcheck={false}
          aria-invalid={text !== "" && !found}
          value={text}
          onInput={(event) => {
            setText(event.currentTarget.value);
            look(event.currentTarget.value, true);
          }}
          onKeyDown={(event) => {
            if (event.key === "Enter") look(text, !event.shiftKey);
            if (event.key === "Escape") close();
            if (event.ctrlKey && event.shiftKey && event.code === "KeyC") {
              event.preventDefault(); // as in the terminal
              void terminal.screen?.copy();
            }
          }}
        />
      </div>
      <output>{text !== "" && !found ? "Not found" : ""}</output>
      <IconButton icon="chevron-up" label="Further up" size={14} onClick={() => look(text, true)} />
      <IconButton icon="chevron-down" label="Further down" size={14} onClick={() => look(text, false)} />
      <IconButton icon="x" label="Close the search" size={14} onClick={close} />
    </search>
  );
}

const KEYS: readonly (readonly [label: string, shown: string, sent: string])[] = [
  ["Esc", "Esc", "\x1b"],
  ["Tab", "Tab", "\t"],
  ["Up", "↑", "\x1b[A"],
  ["Down", "↓", "\x1b[B"],
  ["Left", "←", "\x1b[D"],
  ["Right", "→", "\x1b[C"],
];

/** The keys that a phone's keyboard lacks. */
function Keys({ terminal, current }: { terminal: Terminal; current: Workspace }) {
  const { terminals } = current;
  const [first, ...rest] = KEYS;
  const key = ([label, shown, sent]: (typeof KEYS)[number]) => (
    <button
      type="button"
      key={label}
      aria-label={label}
      // the keyboard stays
      onPointerDown={(event) => event.preventDefault()}
      onClick={() => {
        terminals.claim(terminal);
        terminals.input(terminal, sent);
      }}
    >
      {shown}
    </button>
  );
  return (
    <div class="terminal-keys" role="toolbar" aria-label="Keys">
      {key(first!)}
      <button
        type="button"
        aria-label="Ctrl with the next letter"
        aria-pressed={terminals.ctrl.value}
        onPointerDown={(event) => event.preventDefault()}
        onClick={() => {
          terminals.ctrl.value = !terminals.ctrl.value;
        }}
      >
        Ctrl
      </button>
      {rest.map(key)}
    </div>
  );
}

/** Events by which somebody scrolls a strip of tabs. */
const SCROLLS = ["wheel", "touchmove"] as const;

function TerminalTab({ terminal, current }: { terminal: Terminal; current: Workspace }) {
  const { terminals } = current;
  const active = terminals.active.value === terminal;
  const state = terminal.state.value;
  const element = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const tab = element.current;
    const strip = tab?.parentElement;
    if (!active || !tab || !strip) return;
    // who goes from tab to tab by keys stays among them
    if (strip.contains(document.activeElement)) tab.focus({ preventScroll: true });
    // now, and again when what is beside the tabs leaves them less room, as a terminal's own buttons do, or
    // the tab gets wider; but not for who goes through the strip by wheel or finger meanwhile
    const watching = new ResizeObserver(() => tab.scrollIntoView({ block: "nearest", inline: "nearest" }));
    const leave = () => watching.disconnect();
    watching.observe(strip);
    watching.observe(tab);
    for (const kind of SCROLLS) strip.addEventListener(kind, leave, { passive: true });
    return () => {
      leave();
      for (const kind of SCROLLS) strip.removeEventListener(kind, leave);
    };
  }, [active]);
  return (
    <div
      ref={element}
      class={`panel-tab ${active ? "active" : ""}`}
      role="tab"
      aria-selected={active}
      tabIndex={active ? 0 : -1}
      onClick={() => {
        terminal.wanted = true;
        terminals.active.value = terminal;
        terminal.screen?.focus();
      }}
      onKeyDown={(event) => {
        if (event.key === "ArrowRight") terminals.step(1);
        else if (event.key === "ArrowLeft") terminals.step(-1);
        else if (event.key === "Enter") terminal.screen?.focus();
        else if (event.key === "Delete") {
          const { previousElementSibling, nextElementSibling } = event.currentTarget;
          ((previousElementSibling ?? nextElementSibling) as HTMLElement | null)?.focus();
          terminals.close(terminal);
        }
      }}
    >
      <span class={`lamp ${state}`} title={state} />
      <Icon name={terminal.foreign ? "eye" : "square-terminal"} size={13} />
      <span class="name">{terminal.title.value}</span>
      <button
        type="button"
        class="close"
        tabIndex={-1}
        aria-label={`Close ${terminal.title.value}`}
        onClick={(event) => {
          event.stopPropagation();
          terminals.close(terminal);
        }}
      >
        <Icon name="x" size={12} />
      </button>
    </div>
  );
}

function Others({ current, found }: { current: Workspace; found: readonly ExecInfo[] }) {
  const close = () => {
    others.value = null;
  };
  return (
    <div class="others" role="menu">
      <p>{found.length === 0 ? "No other terminal runs in this tenant." : "Terminals that run elsewhere:"}</p>
      {found.map((exec) => (
        <button
          type="button"
          role="menuitem"
          key={exec.exec}
          onClick={() => {
            current.terminals.watch(exec.exec, exec.argv[0]?.split("/").pop() ?? "command", false);
            close();
          }}
        >
          <Icon name="square-terminal" size={14} />
          <code>{exec.argv.join(" ").slice(0, 60)}</code>
          <span class="where">
            pid {exec.pid}, {exec.attached} {exec.attached === 1 ? "viewer" : "viewers"}
          </span>
        </button>
      ))}
      <button type="button" role="menuitem" onClick={close}>
        Close
      </button>
    </div>
  );
}

function TerminalView({
  terminal,
  current,
  shown,
}: {
  terminal: Terminal;
  current: Workspace;
  shown: boolean;
}) {
  const host = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (!shown || host.current === null) return;
    const element = host.current;
    let gone = false;
    void (async () => {
      let { screen } = terminal;
      if (screen === null) {
        if (!terminal.wanted) await current.begun().then(idle);
        const { Screen } = await load(() => import("../terminal/screen.js"));
        await document.fonts.load('12px "JetBrains Mono Variable"').catch(() => {});
        if (gone || terminal.screen !== null) return;
        const made = new Screen(terminal.foreign, terminal.foreign);
        screen = made;
        screen.onInput = (data) => current.terminals.input(terminal, data);
        screen.onResize = () => current.terminals.resized(terminal);
        screen.onFocus = () => current.terminals.claim(terminal);
        element.append(screen.element);
        screen.open();
        void current.terminals.run(terminal, made);
      } else if (screen.element.parentElement !== element) element.append(screen.element);
      screen.fit();
      if (terminal.wanted && !phone.value) screen.focus();
      terminal.wanted = false;
    })().catch(complain);
    let frame = 0;
    const observer = new ResizeObserver(() => {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => terminal.screen?.fit());
    });
    observer.observe(element);
    const stop = effect(() => {
      void dark.value;
      queueMicrotask(() => terminal.screen?.recolour());
    });
    return () => {
      gone = true;
      observer.disconnect();
      stop();
    };
  }, [shown, terminal, current]);
  return (
    <div class={`screen-host ${terminal.state.value}`} ref={host} hidden={!shown} data-exec={terminal.id}>
      {terminal.state.value === "away" && (
        <div class="away">{session.value === null ? "waiting for you to sign in…" : "reconnecting…"}</div>
      )}
    </div>
  );
}
