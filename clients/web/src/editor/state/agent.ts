/** The operator's agent: sends prompts, follows its work, stops it, and continues after a reload. */

import { GatewayError, type GatewayEvent, type Tenant, type Turn } from "@incus-gateway/client";
import { effect, signal } from "@preact/signals";
import { BrokenStream, messages } from "./agent-stream.js";
import { Conversation, type Said } from "./conversation.js";
import { look, who } from "./session.js";

/** The URL of the agent's server, set by the operator; null without one. */
export const agentUrl =
  document.querySelector<HTMLMetaElement>('meta[name="agent-url"]')?.content.trim() || null;

const KEPT = "gateway.agent.";
/** Characters kept for a reload, and of a prompt, at most. */
const [ROOM, LONGEST] = [400_000, 200_000];
/** Milliseconds without a change before the conversation is stored. */
const REST = 400;
/** Milliseconds after an agent's end for its turn to be reported. */
const LATE = 15_000;

interface Kept {
  readonly by: string;
  readonly session: string | null;
  readonly said: readonly Said[];
  readonly draft: string;
  readonly running: boolean;
}

// signing out leaves nothing behind
let before = "";
effect(() => {
  const out = who() === "" && before !== "";
  before = who();
  if (!out) return;
  for (const key of Object.keys(sessionStorage)) if (key.startsWith(KEPT)) sessionStorage.removeItem(key);
});

export class Agent {
  readonly #tenant: () => Tenant;
  readonly #name: string;
  #conversation: Conversation;
  readonly said = signal<readonly Said[]>([]);
  readonly thinking = signal(false);
  readonly running = signal(false);
  /** The text typed but not sent yet. */
  readonly draft = signal("");
  #ending: AbortController | null = null;
  #subject: string | null = null;
  #ended = 0;
  #drawing = 0;
  #keeping: ReturnType<typeof setTimeout> | undefined;
  readonly #stops: (() => void)[] = [];

  constructor(tenant: () => Tenant, name: string) {
    this.#tenant = tenant;
    this.#name = name;
    const kept = this.#kept();
    this.#conversation = new Conversation(kept?.said, kept?.session ?? null);
    this.draft.value = kept?.draft ?? "";
    if (kept?.running) {
      this.#conversation.rest();
      this.#conversation.note("The page was loaded again, which stopped the agent. Ask it to continue.");
    }
    this.#draw();
    const leaving = () => this.#keep();
    addEventListener("pagehide", leaving);
    this.#stops.push(
      () => removeEventListener("pagehide", leaving),
      effect(() => {
        void [this.said.value, this.draft.value];
        clearTimeout(this.#keeping);
        this.#keeping = setTimeout(leaving, REST);
      }),
    );
  }

  /** Restores the conversation. Storage is not trusted, and another person's conversation is not shown. */
  #kept(): Kept | null {
    try {
      const kept = JSON.parse(sessionStorage.getItem(KEPT + this.#name) ?? "null") as Kept | null;
      if (kept === null || kept.by !== who() || !Array.isArray(kept.said)) return null;
      const kinds = ["asked", "text", "call", "turn", "note"];
      return {
        ...kept,
        said: kept.said.filter((one) => kinds.includes(one?.kind)),
        draft: String(kept.draft),
      };
    } catch {
      return null;
    }
  }

  #keep(): void {
    clearTimeout(this.#keeping);
    if (who() === "") return;
    let said = this.#conversation.said;
    let text: string;
    do {
      const { session } = this.#conversation;
      text = JSON.stringify({
        by: who(),
        session,
        said,
        draft: this.draft.peek(),
        running: this.running.peek(),
      } satisfies Kept);
      said = said.slice(Math.ceil(said.length / 4));
    } while (text.length > ROOM && said.length > 0);
    try {
      sessionStorage.setItem(KEPT + this.#name, text);
    } catch {
      // storage is full or not allowed: the conversation ends with the page
    }
  }

  /** Begins a new conversation. */
  clear(): void {
    this.stop();
    this.#conversation = new Conversation();
    this.#draw();
  }

  stop(): void {
    this.#ending?.abort();
  }

  /** Sends the prompt and follows the agent to its answer. If that fails, the text stays. */
  async ask(): Promise<void> {
    const prompt = this.draft.value.trim();
    if (agentUrl === null || prompt === "" || this.running.value) return;
    if (prompt.length > LONGEST) {
      this.#conversation.note(`This is too long: the limit is ${LONGEST} characters.`, true);
      this.#draw();
      return;
    }
    const conversation = this.#conversation;
    const ending = new AbortController();
    this.#ending = ending;
    this.running.value = true;
    try {
      const { token, subject } = await this.#tenant().agentToken(ending.signal);
      this.#subject = subject;
      this.draft.value = "";
      conversation.ask(prompt);
      this.#draw();
      await this.#work(agentUrl, token, prompt, conversation, ending.signal);
    } catch (error) {
      conversation.rest();
      if (ending.signal.aborted) conversation.note("Stopped.");
      else if (error instanceof GatewayError && error.code === "unauthorized") void look();
      else conversation.note(error instanceof Error ? error.message : String(error), true);
    } finally {
      this.#ended = Date.now();
      this.running.value = false;
      this.#draw();
      this.#keep();
    }
  }

  async #work(
    url: string,
    token: string,
    prompt: string,
    conversation: Conversation,
    signal: AbortSignal,
  ): Promise<void> {
    const { session } = conversation;
    const response = await fetch(url, {
      method: "POST",
      headers: {
        Authorization: `Bearer ${token}`,
        "Content-Type": "application/json",
        Accept: "application/x-ndjson, text/event-stream",
      },
      body: JSON.stringify({ tenant: this.#name, prompt, ...(session === null ? {} : { session }) }),
      // the token is for this address only
      redirect: "error",
      credentials: "omit",
      referrerPolicy: "no-referrer",
      cache: "no-store",
      signal,
    }).catch((error: unknown) => {
      if (signal.aborted) throw error;
      throw new BrokenStream(
        "The agent's server cannot be reached. The gateway's operator can check that it is up and allows this page to use it.",
      );
    });
    if (!response.ok || response.body === null) throw new BrokenStream(await refusal(response));
    let over = false;
    try {
      for await (const message of messages(response.body)) {
        over = conversation.take(message) || over;
        this.#drawSoon();
      }
    } catch (error) {
      if (signal.aborted || error instanceof BrokenStream) throw error;
      over = false;
    }
    if (!over)
      throw new BrokenStream("The connection to the agent broke, which stopped it. Ask it to continue.");
  }

  /** Handles events: the command of a call, and the agent's turn. */
  take({ type, data }: GatewayEvent): void {
    if (type === "tool.started" && typeof data.exec === "string" && typeof data.callId === "string") {
      this.#conversation.runs(data.callId, data.exec);
      this.#drawSoon();
    } else if (type === "turn.committed" && this.#subject !== null) {
      const turn = data as unknown as Turn;
      const late = !this.running.value && Date.now() - this.#ended > LATE;
      if (late || !alike(turn.by, this.#subject)) return;
      const files = turn.files === 1 ? "one file" : `${turn.files} files`;
      this.#conversation.changed(turn.turn, `${files}, +${turn.added} −${turn.removed}`);
      this.#draw();
    }
  }

  dispose(): void {
    this.stop();
    this.#keep();
    cancelAnimationFrame(this.#drawing);
    for (const stop of this.#stops.splice(0)) stop();
    clearTimeout(this.#keeping);
  }

  /** Text arrives faster than the page can be drawn. */
  #drawSoon(): void {
    this.#drawing ||= requestAnimationFrame(() => this.#draw());
  }

  #draw(): void {
    cancelAnimationFrame(this.#drawing);
    this.#drawing = 0;
    this.said.value = [...this.#conversation.said];
    this.thinking.value = this.#conversation.thinking;
  }
}

/** Whether a turn has this title; a commit's title has no brackets. */
function alike(kept: string, name: string): boolean {
  const letters = (text: string) => text.replace(/[^\p{L}\p{N}]/gu, "");
  return letters(kept) === letters(name);
}

/** Returns why a server refuses, in its own words if it gives any. */
async function refusal(response: Response): Promise<string> {
  if (response.status === 401 || response.status === 403)
    return "The agent's server does not accept your token. The gateway's operator can say why.";
  let said = "";
  try {
    const told = JSON.parse((await response.text()).slice(0, 10_000)) as Record<string, unknown> | null;
    const words = told?.detail ?? told?.message ?? told?.error;
    if (typeof words === "string") said = words.slice(0, 1000);
  } catch {
    // the status must do
  }
  return said || `The agent's server answered with the error ${response.status}.`;
}
