/** Reads an agent server's answer: messages of the Agent SDK as SSE, or as lines of JSON. */

/** Characters of one message, at most: the largest contain a file. */
const LONGEST = 32 << 20;
const FOREIGN = "The agent's server sent something that is not a message of the Agent SDK.";

export class BrokenStream extends Error {}

/** Yields each message as it arrives. Throws `BrokenStream` for any other stream. */
export async function* messages(body: ReadableStream<BufferSource>): AsyncGenerator<object> {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const lines = new Lines();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      for (const text of done ? lines.end() : lines.feed(value)) yield parsed(text);
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** Parses text that arrives in pieces, and yields the messages. */
class Lines {
  /** The beginning of a line in pieces, which are joined once. */
  #begin: string[] = [];
  /** The `data` fields of an SSE event. */
  #data: string[] = [];
  #size = 0;

  *feed(piece: string): Generator<string> {
    const [first = "", ...others] = piece.split("\n");
    const pending = [first, ...others];
    const rest = pending.pop() ?? "";
    for (const line of pending) {
      yield* this.#take(this.#begin.join("") + line);
      this.#begin = [];
    }
    this.#begin.push(rest);
    this.#size += rest.length;
    if (this.#size > LONGEST) throw new BrokenStream("The agent's server sent a message that is too long.");
  }

  *end(): Generator<string> {
    yield* this.#take(this.#begin.join(""));
    yield* this.#take("");
  }

  *#take(ended: string): Generator<string> {
    const line = ended.replace(/\r$/, "");
    if (line.startsWith("{")) {
      this.#size = 0;
      yield line;
    } else if (line === "") {
      const text = this.#data.join("\n");
      this.#data = [];
      this.#size = 0;
      if (text !== "") yield text;
    } else {
      const at = line.indexOf(":");
      const field = at < 0 ? line : line.slice(0, at);
      if (field === "data") {
        this.#data.push(line.slice(at + 1).replace(/^ /, ""));
        this.#size += line.length;
      } else if (!["", "event", "id", "retry"].includes(field)) throw new BrokenStream(FOREIGN);
    }
  }
}

function parsed(text: string): object {
  let message: unknown;
  try {
    message = JSON.parse(text);
  } catch {
    // as below
  }
  if (typeof message !== "object" || message === null) throw new BrokenStream(FOREIGN);
  return message;
}
