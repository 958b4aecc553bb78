/** The keys of other editors, each loaded once somebody chooses it, with the editor's own commands in it. */

import type { Extension } from "@codemirror/state";
import { run } from "../state/commands.js";

export async function keysOf(name: string): Promise<Extension> {
  return name === "vim" ? await vim() : name === "emacs" ? await emacs() : [];
}

async function vim(): Promise<Extension> {
  const { Vim, vim } = await import("@replit/codemirror-vim");
  Vim.defineEx("write", "w", () => run("file.save"));
  Vim.defineEx("wall", "wa", () => run("file.saveAll"));
  Vim.defineEx("quit", "q", () => run("file.close"));
  Vim.defineEx("edit", "e", () => run("file.open"));
  return vim({ status: true });
}

/** What Emacs calls it, and what it is here. */
const EMACS: readonly (readonly [keys: string, id: string])[] = [
  ["C-x C-s", "file.save"],
  ["C-x s", "file.saveAll"],
  ["C-x C-f", "file.open"],
  ["C-x k", "file.close"],
  ["M-x", "palette"],
];

async function emacs(): Promise<Extension> {
  const { EmacsHandler, emacs } = await import("@replit/codemirror-emacs");
  for (const [keys, id] of EMACS) {
    EmacsHandler.addCommands({ [id]: () => run(id) });
    EmacsHandler.bindKey(keys, id);
  }
  return emacs();
}
