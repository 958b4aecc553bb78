/** The tenant's eight tools, typed, and what they answer. */

import { type Facts, GatewayError } from "./errors.js";

export interface ToolOptions {
  /** The same id and input again returns the recorded result. One is made up where left out. */
  readonly callId?: string | undefined;
  /** For how long the call goes on where the connection broke, so that it can be joined again; 30 s by default. */
  readonly lingerMs?: number | undefined;
  /** Cancels the call, and ends what it runs. */
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
  /** True where left out. */
  readonly lineNumbers?: boolean | undefined;
  /** Lines around a match, in content mode, as `after` and `context`. */
  readonly before?: number | undefined;
  readonly after?: number | undefined;
  readonly context?: number | undefined;
  readonly headLimit?: number | undefined;
  readonly offset?: number | undefined;
}

export interface BashOptions extends ToolOptions {
  /** 120 000 where left out, at most 600 000. Then it goes on in the background, and `status` is `running`. */
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

/** What a tool answered, in the shape of an MCP tool result. */
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

/** What Bash and BashOutput answered. An exit code other than 0 is a result, not an error. */
export class ShellResult extends ToolResult {
  get status(): "running" | "completed" | "failed" | "killed" {
    return this.structuredContent.status as "running" | "completed" | "failed" | "killed";
  }

  /** What the command ended with; null while it runs. */
  get exitCode(): number | null {
    return (this.structuredContent.exitCode as number | undefined) ?? null;
  }

  /** The id of the command, for `Tenant.attach`. */
  get exec(): string {
    return String(this.structuredContent.exec);
  }

  /** The id of a command in the background, for `bashOutput` and `killShell`. */
  get shellId(): string | null {
    return (this.structuredContent.shellId as string | undefined) ?? null;
  }

  /** Where all of the output lies, for `read`, where the text is not all. */
  get outputFile(): string | null {
    return (this.structuredContent.outputFile as string | undefined) ?? null;
  }
}

/** A failure in a tool's own terms is thrown as the error of its code; of a command only where nothing has run. */
export abstract class Tools {
  /** Calls a tool by its name. A failure in the tool's own terms is a result with `isError`. */
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

  /** Replaces `old`, which must be in the file once unless `replaceAll`, by `new`. */
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

  /** Runs a line in this session's working directory; an exit code is in the result, whatever it is. */
  bash(command: string, options: BashOptions = {}): Promise<ShellResult> {
    const { timeoutMs: timeout, background: run_in_background, description, ...call } = options;
    return this.#shell("Bash", { command, timeout, run_in_background, description }, call);
  }

  /** Returns what a command in the background has printed since the last call; its end too. */
  bashOutput(
    shellId: string,
    options: ToolOptions & { readonly filter?: string | undefined } = {},
  ): Promise<ShellResult> {
    const { filter, ...call } = options;
    return this.#shell("BashOutput", { bash_id: shellId, filter }, call);
  }

  /** Ends a command in the background with all that it started. */
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
