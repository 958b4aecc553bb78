/** The terminals of this window: commands that outlive the page, and their screens. */

import {
  Disconnected,
  type Exec,
  type ExecInfo,
  type Exit,
  GatewayError,
  type GatewayEvent,
  type Tenant,
  unique,
} from "@incus-gateway/client";
import { signal } from "@preact/signals";
import type { Screen } from "../terminal/screen.js";
import { complain } from "./toasts.js";

/** Begins the id of each editor's terminals: somebody sits at them, they are no agent's work. */
export const TERMINAL = "terminal-";

export type TerminalState = "starting" | "running" | "away" | "ended" | "lost";

/** How long a shell waits for somebody to come back to it. */
const LINGER = 30 * 60_000;
const BUFFER = 2 << 20;
/** Milliseconds after which a tenant's start is an old event. */
const RECENT = 60_000;
const SHELL = ["/bin/bash", "-l"];
const ENVIRONMENT = { TERM: "xterm-256color", COLORTERM: "truecolor", LANG: "C.UTF-8" };

interface Kept {
  readonly id: string;
  readonly title: string;
  readonly foreign?: boolean;
}

let count = 0;

export class Terminal {
  /** Names it in this window, from before it has an id. */
  readonly key = ++count;
  readonly state = signal<TerminalState>("starting");
  readonly exit = signal<Exit | null>(null);
  readonly title;
  exec: Exec | null = null;
  screen: Screen | null = null;
  /** The user opened it and wants to type. A terminal that opens by itself does not take the focus. */
  wanted = false;
  /** It draws recorded output, whose queries were answered before. */
  replaying = false;
  /** This window answers the program's queries. Other windows may show the same terminal, and must not. */
  answers = false;
  /** It did not end by itself: the tenant or the gateway went away, or somebody sent a signal. */
  taken = false;

  constructor(
    public id: string,
    title: string,
    /** Somebody else's command: it is only looked at, and goes on when we leave. */
    readonly foreign: boolean,
  ) {
    this.title = signal(title);
  }

  get over(): boolean {
    return this.state.value === "ended" || this.state.value === "lost";
  }
}

export class Terminals {
  readonly #tenant: () => Tenant;
  readonly #key: string;
  readonly list = signal<readonly Terminal[]>([]);
  readonly active = signal<Terminal | null>(null);
  /** Carries the ids of terminals that get the focus to this browser's other windows. */
  readonly #windows = new BroadcastChannel("gateway.terminals");
  #count = 0;

  constructor(tenant: () => Tenant, name: string) {
    this.#tenant = tenant;
    this.#key = `gateway.terminals.${name}`;
    for (const { id, title, foreign } of this.#kept())
      this.#add(new Terminal(id, title, foreign === true), false);
    this.#windows.onmessage = ({ data }) => {
      for (const terminal of this.list.value) if (terminal.id === data) terminal.answers = false;
    };
  }

  #kept(): readonly Kept[] {
    try {
      const kept: unknown = JSON.parse(sessionStorage.getItem(this.#key) ?? "[]");
      return Array.isArray(kept) ? kept.filter((entry) => typeof entry?.id === "string") : [];
    } catch {
      return [];
    }
  }

  #keep(): void {
    const kept = this.list.value
      .filter(({ state }) => state.value !== "ended" && state.value !== "lost")
      .map(({ id, title, foreign }) => ({ id, title: title.value, foreign }));
    sessionStorage.setItem(this.#key, JSON.stringify(kept));
  }

  #add(terminal: Terminal, keep = true): Terminal {
    this.#count += 1;
    this.list.value = [...this.list.value, terminal];
    this.active.value = terminal;
    if (keep) this.#keep();
    return terminal;
  }

  /** Opens a new shell. It starts when its screen knows its size; `wanted` takes the focus to it. */
  open(wanted: boolean): Terminal {
    const terminal = new Terminal("", `bash ${this.#count + 1}`, false);
    terminal.wanted = wanted;
    return this.#add(terminal, false);
  }

  /** Shows a command that runs already. */
  watch(exec: string, title: string, foreign = true): Terminal {
    const found = this.list.value.find(({ id }) => id === exec);
    if (found !== undefined) {
      this.active.value = found;
      return found;
    }
    const terminal = new Terminal(exec, title, foreign);
    terminal.wanted = true;
    return this.#add(terminal);
  }

  /** The tenant's other terminals, which could be shown here too. */
  async others(): Promise<readonly ExecInfo[]> {
    const here = new Set(this.list.value.map(({ id }) => id));
    const execs = await this.#tenant().execs();
    return execs.filter(({ exec, state, pty }) => state === "running" && Boolean(pty) && !here.has(exec));
  }

  /** Has shells that a stop of the tenant ended restart, once it runs again. */
  take({ type, time }: GatewayEvent): void {
    if (type !== "tenant.started" && type !== "tenant.restarted") return;
    if (Date.now() - Date.parse(time) > RECENT) return; // a replayed event
    for (const terminal of this.list.value) if (terminal.over && terminal.taken) this.again(terminal);
  }

  /** Starts a new shell on the screen of one that has ended. */
  again(terminal: Terminal): void {
    if (!terminal.over || terminal.foreign || terminal.screen === null) return;
    terminal.id = "";
    terminal.exec = null;
    terminal.exit.value = null;
    terminal.state.value = "starting";
    void this.run(terminal, terminal.screen);
  }

  /** Starts the command, or attaches to it, and copies its output to the screen until it ends. */
  async run(terminal: Terminal, screen: Screen): Promise<void> {
    terminal.screen = screen;
    const tenant = this.#tenant();
    let seen = 0;
    try {
      if (terminal.id === "") {
        const options = { pty: screen.size, env: ENVIRONMENT, lingerMs: LINGER, buffer: BUFFER };
        terminal.id = TERMINAL + unique(); // known before its events come
        terminal.answers = true;
        this.#keep();
        terminal.exec = await tenant.exec(SHELL, { ...options, execId: terminal.id });
      } else {
        const known = (await tenant.execs()).find(({ exec }) => exec === terminal.id);
        seen = known?.offsets.stdout ?? 0;
        terminal.answers ||= known?.attached === 0;
        terminal.exec = await tenant.attach(terminal.id, {}, { buffer: BUFFER });
        if (!terminal.foreign && known?.state === "running") void this.#redraw(terminal, screen);
      }
      terminal.state.value = "running";
      const exec = terminal.exec;
      exec.on("attached", (is) => {
        terminal.state.value = is ? "running" : "away";
      });
      exec.on("lost", ({ bytes }) => screen.note(`${bytes.toLocaleString()} bytes skipped`));
      for await (const { data } of exec.output()) {
        const replayed = Math.max(0, seen - (exec.stdout.taken - data.length));
        if (replayed > 0) {
          terminal.replaying = true;
          await screen.write(data.subarray(0, replayed));
          terminal.replaying = false;
        }
        if (replayed < data.length) await screen.write(data.subarray(replayed));
      }
      const exit = await exec.exit;
      terminal.exit.value = exit;
      terminal.state.value = exit.reason === "lost" ? "lost" : "ended";
      terminal.taken = exit.reason === "lost" || (exit.reason === "exited" && exit.signal !== null);
      screen.note(ending(exit, terminal.foreign));
    } catch (error) {
      terminal.state.value = "lost";
      terminal.taken = error instanceof GatewayError && error.code === "tenant_not_running";
      const known = error instanceof GatewayError && error.code === "not_found";
      const message = error instanceof Error ? error.message : String(error);
      const said = known ? "This command has ended, and its output is no longer kept." : message;
      screen.note(terminal.foreign ? said : `${said} ${ANEW}`);
    } finally {
      this.#keep();
    }
  }

  /** Makes a full-screen program redraw, by changing the size and changing it back. */
  async #redraw(terminal: Terminal, screen: Screen): Promise<void> {
    const { cols, rows } = screen.size;
    await terminal.exec?.resize({ cols, rows: Math.max(1, rows - 1) }).catch(() => {});
    await terminal.exec?.resize({ cols, rows }).catch(() => {});
  }

  /** Shows the terminal so many tabs behind the one that is shown, and returns it. */
  step(by: number): Terminal | null {
    const { list, active } = this;
    if (active.value === null) return null;
    const at = list.value.indexOf(active.value) + by + list.value.length;
    active.value = list.value[at % list.value.length] ?? null;
    return active.value;
  }

  /** The next letter is one with Ctrl: a phone's keyboard has no such key. */
  readonly ctrl = signal(false);

  /** Makes this window the only one of the browser that answers the terminal's program. */
  claim(terminal: Terminal): void {
    terminal.answers = true;
    this.#windows.postMessage(terminal.id);
  }

  input(terminal: Terminal, typed: string | Uint8Array): void {
    let data = typed;
    // what begins with Esc is another key; of letters a phone's keyboard may give several at once
    if (this.ctrl.value && typeof data === "string" && !escaped(data)) {
      this.ctrl.value = false;
      data = control(data.charAt(0)) + data.slice(1);
    }
    if (terminal.over && data === "\r") this.again(terminal);
    if (terminal.foreign || terminal.exec === null || terminal.over) return;
    if ((terminal.replaying || !terminal.answers) && escaped(data)) return;
    terminal.exec.write(data).catch((error) => {
      if (!(error instanceof Disconnected)) complain(error);
    });
  }

  resized(terminal: Terminal): void {
    if (terminal.screen === null || terminal.foreign || terminal.state.value !== "running") return;
    terminal.exec?.resize(terminal.screen.size).catch(() => {});
  }

  /** Kills the command with everything that it has started. */
  async cancel(terminal: Terminal): Promise<void> {
    const killed = await terminal.exec?.cancel().catch((error) => complain(error, "Ending the command"));
    if (killed && killed.survivors > 0)
      complain(new Error(`${killed.survivors} processes could not be ended`));
  }

  close(terminal: Terminal): void {
    const at = this.list.value.indexOf(terminal);
    if (at < 0) return;
    if (terminal.foreign) void terminal.exec?.detach().catch(() => {});
    else if (terminal.exec?.running) void this.cancel(terminal);
    terminal.screen?.dispose();
    this.list.value = this.list.value.toSpliced(at, 1);
    if (this.active.value === terminal) this.active.value = this.list.value[Math.max(0, at - 1)] ?? null;
    this.#keep();
  }

  dispose(): void {
    this.#windows.close();
    for (const terminal of this.list.value) terminal.screen?.dispose();
  }
}

/** Whether this is an escape sequence: a key such as an arrow, or an answer of xterm.js to a query. */
function escaped(data: string | Uint8Array): boolean {
  return typeof data === "string" && data.length > 1 && data.startsWith("\x1b");
}

/** Returns the character that Ctrl makes of a letter. */
export function control(letter: string): string {
  const code = letter.toUpperCase().charCodeAt(0);
  return code >= 64 && code < 96 ? String.fromCharCode(code - 64) : letter;
}

const ANEW = "Enter starts a new shell.";

function ending({ code, signal, reason }: Exit, foreign: boolean): string {
  const said = () => {
    if (reason === "lost") return "The command is lost: the gateway or the tenant went away.";
    if (reason === "cancelled") return "The command was cancelled.";
    if (signal !== null) return `The command was ended by SIG${signal}.`;
    return code === 0 ? "The command has ended." : `The command has ended with ${code}.`;
  };
  return foreign ? said() : `${said()} ${ANEW}`;
}
