/** The keys of Vim, loaded once somebody chooses them, with the editor's own commands in them. */

import type { Extension } from "@codemirror/state";
import { run } from "../state/commands.js";
import { load } from "../state/network.js";

export async function keysOf(name: string): Promise<Extension> {
  return name === "vim" ? await vim() : [];
}

async function vim(): Promise<Extension> {
  const { Vim, vim } = await load(() => import("@replit/codemirror-vim"));
  Vim.defineEx("write", "w", () => run("file.save"));
  Vim.defineEx("wall", "wa", () => run("file.saveAll"));
  Vim.defineEx("quit", "q", () => run("file.close"));
  Vim.defineEx("edit", "e", () => run("file.open"));
  return vim({ status: true });
}
