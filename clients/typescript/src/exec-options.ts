/** How a command is started, and attached to. */

import type { Size } from "./types.js";

export interface ExecOptions {
  readonly cwd?: string | undefined;
  readonly env?: Readonly<Record<string, string>> | undefined;
  readonly user?: string | number | undefined;
  /** A terminal of this size; includes `stdin`, and joins both outputs in `stdout`. */
  readonly pty?: Size | undefined;
  readonly stdin?: boolean | undefined;
  readonly timeoutMs?: number | undefined;
  /** How long it continues without a client attached: default 60 000, −1 without end. */
  readonly lingerMs?: number | undefined;
  /** The history names no author for its changes, as for those of a language server. */
  readonly helper?: boolean | undefined;
  readonly execId?: string | undefined;
  /** How many unread bytes may wait here; see `Exec`. */
  readonly buffer?: number | undefined;
  /** With `"utf-8"` no chunk of output ends inside a character. */
  readonly encoding?: Encoding | undefined;
  /** An abort ends a started command with its process tree, or detaches from one that was attached to. */
  readonly signal?: AbortSignal | undefined;
}

/** Options of an attachment. */
export type AttachOptions = Pick<ExecOptions, "buffer" | "encoding" | "signal">;

export type Encoding = "binary" | "utf-8";
