/** The tenant's eight tools, typed, and their results. */

import { type Facts, GatewayError } from "./errors.js";

export interface ToolOptions {
  /** A second call with the same id and input returns the recorded result. Default: a random id. */
  readonly callId?: string | undefined;
  /** How long the call continues after a broken connection, so that it can be joined again; default 30 s. */
  readonly lingerMs?: number | undefined;
  /** Cancels the call, and ends all that it runs. */
  readonly signal?: AbortSignal | undefined;
}

export interface ReadOptions extends ToolOptions {
  readonly offset?: number | undefined;
  readonly limit?: number | undefined;
  /** Of a PDF, such as `"1-5"`. */
  readonly pages?: string | undefined;
  readonly allowLarge?: boolean | undefined;
}

export interface GrepOptions extends ToolOptions {
  readonly path?: string | undefined;
  readonly glob?: string | undefined;
  readonly type?: string | undefined;
  readonly outputMode?: "content" | "files_with_matches" | "count" | undefined;
  readonly ignoreCase?: boolean | undefined;
  readonly onlyMatching?: boolean | undefined;
  readonly multiline?: boolean | undefined;
  /** Default true. */
  readonly lineNumbers?: boolean | undefined;
  /** Lines around a match, in content mode, as `after` and `context`. */
  readonly before?: number | undefined;
  readonly after?: number | undefined;
  readonly context?: number | undefined;
  readonly headLimit?: number | undefined;
  readonly offset?: number | undefined;
}

export interface BashOptions extends ToolOptions {
  /** Default 120 000, at most 600 000. After that it continues in the background, and `status` is `running`. */
  readonly timeoutMs?: number | undefined;
  readonly background?: boolean | undefined;
  readonly description?: string | undefined;
}

export type ToolContent =
  | { readonly type: "text"; readonly text: string }
  | { readonly type: "image"; readonly data: string; readonly mimeType: string }
  | {
      readonly type: "resource";
      readonly resource: { readonly uri: string; readonly mimeType?: string; readonly blob?: string };
    };

/** A tool's result, in the form of an MCP tool result. */
export class ToolResult {
  constructor(
    readonly content: readonly ToolContent[],
    readonly isError: boolean = false,
    /** The same facts as data. */
    readonly structuredContent: Facts = {},
  ) {}

  /** The text parts, joined by newlines. */
  get text(): string {
    return this.content.flatMap((part) => (part.type === "text" ? [part.text] : [])).join("\n");
  }

  /** @internal */
  static of(answer: Partial<Pick<ToolResult, "content" | "isError" | "structuredContent">>): ToolResult {
    return new ToolResult(answer.content ?? [], answer.isError ?? false, answer.structuredContent ?? {});
  }
}

/** The result of Bash and BashOutput. An exit code other than 0 is a result, not an error. */
export class ShellResult extends ToolResult {
  get status(): "running" | "completed" | "failed" | "killed" {
    return this.structuredContent.status as "running" | "completed" | "failed" | "killed";
  }

  /** The exit code; null while the command runs. */
  get exitCode(): number | null {
    return (this.structuredContent.exitCode as number | undefined) ?? null;
  }

  /** The id of the command, for `Tenant.attach`. */
  get exec(): string {
    return String(this.structuredContent.exec);
  }

  /** The id of a background command, for `bashOutput` and `killShell`. */
  get shellId(): string | null {
    return (this.structuredContent.shellId as string | undefined) ?? null;
  }

  /** The file with the whole output, for `read`, if the text is not all of it. */
  get outputFile(): string | null {
    return (this.structuredContent.outputFile as string | undefined) ?? null;
  }
}

/** Throws the error of its code if a tool fails; for a command, only if nothing ran. */
export abstract class Tools {
  /** Calls a tool by its name. A failure of the tool itself is a result with `isError`. */
  abstract tool(name: string, args: object, options?: ToolOptions): Promise<ToolResult>;

  /** Reads lines of a file, or `pages` of a PDF. */
  read(path: string, options: ReadOptions = {}): Promise<ToolResult> {
    const { offset, limit, pages, allowLarge: allow_large, ...call } = options;
    return this.#call("Read", { file_path: path, offset, limit, pages, allow_large }, call);
  }

  /** Writes a whole file, with the folders above it. */
  write(path: string, content: string, options?: ToolOptions): Promise<ToolResult> {
    return this.#call("Write", { file_path: path, content }, options);
  }

  /** Replaces `old` by `new`. `old` must occur exactly once, unless `replaceAll`. */
  edit(
    path: string,
    old: string,
    replacement: string,
    options: ToolOptions & { readonly replaceAll?: boolean | undefined } = {},
  ): Promise<ToolResult> {
    const { replaceAll: replace_all, ...call } = options;
    const args = { file_path: path, old_string: old, new_string: replacement, replace_all };
    return this.#call("Edit", args, call);
  }

  /** Finds files by name. */
  glob(
    pattern: string,
    options: ToolOptions & { readonly path?: string | undefined } = {},
  ): Promise<ToolResult> {
    const { path, ...call } = options;
    return this.#call("Glob", { pattern, path }, call);
  }

  /** Searches in files. */
  grep(pattern: string, options: GrepOptions = {}): Promise<ToolResult> {
    const { callId, lingerMs, signal, ...given } = options;
    const args = {
      pattern,
      path: given.path,
      glob: given.glob,
      type: given.type,
      output_mode: given.outputMode,
      "-i": given.ignoreCase,
      "-o": given.onlyMatching,
      multiline: given.multiline,
      "-n": given.lineNumbers,
      "-B": given.before,
      "-A": given.after,
      context: given.context,
      head_limit: given.headLimit,
      offset: given.offset,
    };
    return this.#call("Grep", args, { callId, lingerMs, signal });
  }

  /** Runs a command line in this session's working directory; any exit code is a result. */
  bash(command: string, options: BashOptions = {}): Promise<ShellResult> {
    const { timeoutMs: timeout, background: run_in_background, description, ...call } = options;
    return this.#shell("Bash", { command, timeout, run_in_background, description }, call);
  }

  /** Returns the output of a background command since the last call, and its end. */
  bashOutput(
    shellId: string,
    options: ToolOptions & { readonly filter?: string | undefined } = {},
  ): Promise<ShellResult> {
    const { filter, ...call } = options;
    return this.#shell("BashOutput", { bash_id: shellId, filter }, call);
  }

  /** Ends a background command and all that it started. */
  killShell(shellId: string, options?: ToolOptions): Promise<ToolResult> {
    return this.#call("KillShell", { shell_id: shellId }, options);
  }

  async #call(name: string, args: object, options?: ToolOptions): Promise<ToolResult> {
    const result = await this.tool(name, args, options);
    if (result.isError) throw failure(result);
    return result;
  }

  async #shell(name: string, args: object, options?: ToolOptions): Promise<ShellResult> {
    const result = await this.tool(name, args, options);
    const { exec, status } = result.structuredContent;
    if (result.isError && (exec === undefined || status === undefined)) throw failure(result);
    return new ShellResult(result.content, result.isError, result.structuredContent);
  }
}

function failure(result: ToolResult): GatewayError {
  const { code = "unavailable", ...facts } = result.structuredContent;
  return new GatewayError(String(code), result.text, facts);
}
