/** Every command of the editor, its key, and when it is available. */

import { signal } from "@preact/signals";
import { keys as textKeys } from "./settings.js";

export interface Command {
  readonly id: string;
  readonly title: string;
  /** As `Mod-Shift-p`: Mod is Ctrl, and Cmd on a Mac. */
  readonly keys?: string;
  /** Keys that the text takes by itself, to be shown. */
  readonly textKeys?: string;
  readonly when?: () => boolean;
  run(): void;
}

export const palette = signal<{
  readonly mode: "files" | "commands" | "tenants";
  readonly initial: string;
} | null>(null);

const MAC = /Mac|iPhone|iPad/.test(navigator.platform);
const registered: Command[] = [];

export function register(...commands: readonly Command[]): void {
  registered.push(...commands);
}

export function available(): readonly Command[] {
  return registered.filter((command) => command.when?.() ?? true);
}

export function run(id: string): void {
  const command = registered.find((entry) => entry.id === id);
  if (command?.when?.() ?? true) command?.run();
}

/** How a key is written for a person. */
export function shown(keys: string): string {
  const names: Readonly<Record<string, string>> = MAC
    ? { Mod: "⌘", Shift: "⇧", Alt: "⌥" }
    : { Mod: "Ctrl", Shift: "Shift", Alt: "Alt" };
  const parts = keys.split("-").map((part) => names[part] ?? (part.length === 1 ? part.toUpperCase() : part));
  return parts.join(MAC ? "" : "+");
}

export function keysOf(id: string): string | undefined {
  const keys = registered.find((command) => command.id === id)?.keys;
  return keys === undefined ? undefined : shown(keys);
}

function pressed(event: KeyboardEvent): string {
  const mod = MAC ? event.metaKey : event.ctrlKey;
  // by its code, where a modifier makes another character of the key
  const key = event.code === "Backquote" ? "`" : event.code === "Backslash" ? "\\" : event.key;
  return [
    mod && "Mod",
    event.altKey && "Alt",
    event.shiftKey && "Shift",
    key.length === 1 ? key.toLowerCase() : key,
  ]
    .filter(Boolean)
    .join("-");
}

addEventListener(
  "keydown",
  (event) => {
    if (event.isComposing) return;
    const keys = pressed(event);
    // a terminal needs Ctrl and Alt with a letter for itself, and the keys of Vim need Ctrl
    const within = (place: string) => event.target instanceof Element && event.target.closest(place) !== null;
    if (!MAC && within(".screen") && /^(Mod|Alt)-[a-z\\]$/.test(keys)) return;
    if (!MAC && textKeys.value !== "default" && within(".cm-content") && /^Mod-[a-z\\]$/.test(keys)) return;
    const command = available().find((entry) => entry.keys === keys);
    if (command === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    command.run();
  },
  { capture: true },
);
