/** A conversation with an agent, from the SDK's messages. A model wrote their contents: nothing is trusted. */

export interface Call {
  readonly kind: "call";
  readonly id: string;
  readonly name: string;
  /** Its input in a few words. */
  readonly what: string;
  /** The file concerned. */
  readonly path: string | null;
  readonly state: "running" | "done" | "failed" | "stopped";
  /** The beginning of the result. */
  readonly said: string;
  /** The command whose output can be shown. */
  readonly exec: string | null;
  /** Whether a sub-agent made it. */
  readonly nested: boolean;
}

export type Said =
  | { readonly kind: "asked"; readonly text: string }
  | { readonly kind: "text"; readonly text: string; readonly live: boolean }
  | Call
  | { readonly kind: "turn"; readonly turn: string; readonly what: string }
  | { readonly kind: "note"; readonly text: string; readonly bad: boolean };

const [MOST, TEXT, RESULT, WORDS] = [400, 100_000, 4000, 300];

const ENDS: Readonly<Record<string, string>> = {
  error_max_turns: "The agent stopped: it reached its server's limit of steps.",
  error_max_budget_usd: "The agent stopped: it reached its server's cost limit.",
};
const FAILURES: Readonly<Record<string, string>> = {
  authentication_failed: "The model does not accept the key of the agent's server.",
  billing_error: "The account of the agent's server cannot pay for the model.",
  rate_limit: "The model gets too many requests right now. Try again in a while.",
  overloaded: "The model is overloaded. Try again in a while.",
};

type Facts = Readonly<Record<string, unknown>>;

function facts(value: unknown): Facts {
  return typeof value === "object" && value !== null ? (value as Facts) : {};
}

function text(value: unknown, most: number): string {
  const all = typeof value === "string" ? value : "";
  return all.length > most ? `${all.slice(0, most)}…` : all;
}

function blocks(message: unknown): readonly Facts[] {
  const { content } = facts(message);
  if (typeof content === "string") return [{ type: "text", text: content }];
  return Array.isArray(content) ? content.map(facts) : [];
}

/** The conversation so far. `take` returns whether a message ended the agent's work. */
export class Conversation {
  #said: Said[];
  /** The server's id of the conversation. */
  session: string | null;
  /** The model's latest activity that is not in the list. */
  thinking = false;

  constructor(said: readonly Said[] = [], session: string | null = null) {
    this.#said = [...said];
    this.session = session;
  }

  get said(): readonly Said[] {
    return this.#said;
  }

  ask(prompt: string): void {
    this.#add({ kind: "asked", text: prompt });
  }

  note(words: string, bad = false): void {
    this.#add({ kind: "note", text: text(words, RESULT), bad });
  }

  /** Ends everything in progress. */
  rest(): void {
    this.thinking = false;
    this.#said = this.#said.map((one) => {
      if (one.kind === "text" && one.live) return { ...one, live: false };
      return one.kind === "call" && one.state === "running" ? { ...one, state: "stopped" } : one;
    });
  }

  /** Links a call to its command. */
  runs(call: string, exec: string): void {
    this.#change(call, { exec });
  }

  changed(turn: string, what: string): void {
    if (!this.#said.some((one) => one.kind === "turn" && one.turn === turn))
      this.#add({ kind: "turn", turn, what: text(what, WORDS) });
  }

  take(message: object): boolean {
    const { type, subtype, session_id, parent_tool_use_id, event, message: inner } = message as Facts;
    if (typeof session_id === "string" && session_id.length <= 200) this.session = session_id;
    const nested = typeof parent_tool_use_id === "string";
    if (type === "stream_event" && !nested) this.#streamed(facts(event));
    else if (type === "assistant") this.#answered(message as Facts, nested);
    else if (type === "user") this.#returned(inner);
    else if (type === "result") this.#ended(message as Facts, String(subtype));
    return type === "result";
  }

  #streamed({ type, delta, content_block }: Facts): void {
    const block = facts(content_block);
    if (type === "content_block_start") {
      this.thinking = block.type === "thinking";
      if (block.type === "text") this.#grow(text(block.text, TEXT));
      if (block.type === "tool_use") this.#call(block, false);
    } else if (type === "content_block_delta") {
      const { type: kind, text: more } = facts(delta);
      if (kind === "text_delta") this.#grow(text(more, TEXT));
    }
  }

  #grow(more: string): void {
    const last = this.#said.at(-1);
    if (last?.kind === "text" && last.live)
      this.#said[this.#said.length - 1] = { ...last, text: text(last.text + more, TEXT) };
    else if (more !== "") this.#add({ kind: "text", text: more, live: true });
  }

  #answered({ message, error }: Facts, nested: boolean): void {
    for (const block of blocks(message)) {
      if (block.type === "tool_use") this.#call(block, nested);
      if (block.type !== "text" || nested) continue;
      const whole = text(block.text, TEXT);
      const at = this.#said.findLastIndex((one) => one.kind === "text" && one.live);
      if (whole === "" || typeof error === "string") {
        // failures are described in our words
        if (at >= 0) this.#said.splice(at, 1);
      } else if (at >= 0) this.#said[at] = { kind: "text", text: whole, live: false };
      else this.#add({ kind: "text", text: whole, live: false });
    }
    if (typeof error === "string" && !nested) this.#failed = FAILURES[error] ?? "";
    this.thinking = false;
  }

  #failed: string | null = null;

  #call({ id, name, input }: Facts, nested: boolean): void {
    const call = text(id, 200);
    if (call === "") return;
    const given = facts(input);
    const path = typeof given.file_path === "string" ? text(given.file_path, 1000) : null;
    const words = [path, given.command, given.pattern, given.description, given.prompt, given.bash_id];
    const what = text(words.find((word) => typeof word === "string") ?? "", WORDS);
    if (this.#said.some((one) => one.kind === "call" && one.id === call)) {
      this.#change(call, { what, path });
      return;
    }
    this.#add({
      kind: "call",
      id: call,
      name: text(name, 100).replace(/^mcp__\w+?__/, ""),
      what,
      path,
      state: "running",
      said: "",
      exec: null,
      nested,
    });
  }

  #returned(message: unknown): void {
    for (const { type, tool_use_id, content, is_error } of blocks(message)) {
      if (type !== "tool_result") continue;
      const parts = blocks({ content }).map((part) => (part.type === "text" ? text(part.text, RESULT) : "…"));
      this.#change(String(tool_use_id), {
        state: is_error === true ? "failed" : "done",
        said: text(parts.join("\n"), RESULT),
      });
    }
  }

  #ended({ is_error, result, errors, terminal_reason }: Facts, subtype: string): void {
    const why = Array.isArray(errors) ? errors.filter((one) => typeof one === "string").join(" ") : result;
    const failed = this.#failed;
    this.#failed = null;
    this.rest();
    if (ENDS[subtype] !== undefined) this.note(ENDS[subtype], true);
    else if (String(terminal_reason).startsWith("aborted")) this.note("Stopped.");
    else if (is_error === true || subtype !== "success")
      this.note(
        failed || `The agent could not continue: ${text(why, 1000) || "its server does not say why"}`,
        true,
      );
  }

  #change(call: string, change: Partial<Call>): void {
    const at = this.#said.findLastIndex((one) => one.kind === "call" && one.id === call);
    const found = this.#said[at];
    if (found?.kind === "call") this.#said[at] = { ...found, ...change };
  }

  #add(said: Said): void {
    this.#said.push(said);
    if (this.#said.length > MOST) this.#said.splice(0, this.#said.length - MOST);
  }
}
