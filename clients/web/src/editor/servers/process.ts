/** A language server as a command in the tenant: messages in and out, its memory, its end. */

import { type Exec, type Tenant, unique } from "@incus-gateway/client";
import { Frames, frame } from "./framing.js";
import installScript from "./install.sh?raw";
import { PACKAGES } from "./kinds.js";
import { type Kind, LANGUAGE_SERVER } from "./served.js";
import startScript from "./start.sh?raw";

/** Milliseconds that it outlives the connection, so that it ends after the page is closed. */
const LINGER = 10_000;
/** Bytes that wait for the connection to come back. A server that misses some cannot be used any more. */
const WAITING_MAX = 4 << 20;
const INSTALL_MS = 300_000;
const MISSING = 69;
/** Characters kept of its errors, to show why it ended. */
const SAID_MAX = 2000;

/** The tenant has no such server: it has to be installed. */
export class Missing extends Error {}

export interface Listener {
  message(text: string): void;
  memory(bytes: number): void;
  /** It has ended or cannot be used any more. */
  ended(error: Error): void;
}

// short, since lists of commands show its words
function command(script: string, ...words: readonly string[]) {
  return { argv: ["/bin/sh", "-c", 'eval "$SCRIPT"', ...words], script };
}

export class ServerProcess {
  readonly #exec: Exec;
  readonly #listener: Listener;
  readonly #frames = new Frames();
  readonly #waiting: Uint8Array[] = [];
  #waits = 0;
  #said = "";
  #over = false;
  /** It has sent something, so it exists. */
  #answered = false;

  private constructor(exec: Exec, listener: Listener) {
    this.#exec = exec;
    this.#listener = listener;
    exec.on("attached", (is) => is && this.#flush());
    exec.on(
      "lost",
      ({ stream }) => stream === "stdout" && this.#end(new Error("Some of its output was lost.")),
    );
    void this.#read();
  }

  static async start(tenant: Tenant, kind: Kind, listener: Listener): Promise<ServerProcess> {
    const { argv, script } = command(startScript, "language-server", kind, PACKAGES[kind].folder);
    const env = { SCRIPT: script };
    const execId = `${LANGUAGE_SERVER}${kind}-${unique()}`;
    const exec = await tenant.exec(argv, { stdin: true, env, execId, lingerMs: LINGER, helper: true });
    return new ServerProcess(exec, listener);
  }

  async #read(): Promise<void> {
    const decoder = new TextDecoder();
    try {
      for await (const { stream, data } of this.#exec.output()) {
        if (stream === "stderr") this.#hear(decoder.decode(data, { stream: true }));
        else
          for (const message of this.#frames.push(data)) {
            this.#answered = true;
            if (!this.#over) this.#listener.message(message);
          }
      }
      const { code, signal } = await this.#exec.exit;
      if (code === MISSING && !this.#answered) this.#end(new Missing());
      else
        this.#end(
          new Error(
            `It ended${signal === null ? ` with ${code}` : ` by SIG${signal}`}. ${this.#said}`.trim(),
          ),
        );
    } catch (error) {
      this.#end(error instanceof Error ? error : new Error(String(error)));
    }
  }

  #hear(text: string): void {
    this.#said = (this.#said + text).slice(-SAID_MAX);
    for (;;) {
      const found = /^language-server: memory (\d{1,10})\n/m.exec(this.#said);
      if (found === null) return;
      this.#said = this.#said.replace(found[0], "");
      this.#listener.memory(Number(found[1]) * 1024);
    }
  }

  send(message: string): void {
    if (this.#over) return; // the end rejects all pending answers
    const bytes = frame(message);
    this.#waiting.push(bytes);
    this.#waits += bytes.length;
    if (this.#waits > WAITING_MAX) this.#end(new Error("The connection was away for too long."));
    else this.#flush();
  }

  /** Sends what waits. If the connection breaks meanwhile, the client sends it again. */
  #flush(): void {
    while (this.#exec.attached && this.#waiting.length > 0) {
      const bytes = this.#waiting.shift()!;
      this.#waits -= bytes.length;
      this.#exec.write(bytes).catch(() => {});
    }
  }

  #end(error: Error): void {
    if (this.#over) return;
    this.stop();
    this.#listener.ended(error);
  }

  /** Ends it without calling the listener. */
  stop(): void {
    if (this.#over) return;
    this.#over = true;
    if (this.#exec.running) void this.#exec.cancel(500).catch(() => {});
  }
}

const installing = new Map<string, Promise<void>>();

/** Installs a server in the tenant for the site's user; concurrent calls share one install. Throws npm's message. */
export function installed(tenant: Tenant, kind: Kind): Promise<void> {
  const key = `${tenant.name} ${PACKAGES[kind].folder}`;
  const work = installing.get(key) ?? install(tenant, kind).finally(() => installing.delete(key));
  installing.set(key, work);
  return work;
}

async function install(tenant: Tenant, kind: Kind): Promise<void> {
  const { folder, manifest, lock } = PACKAGES[kind];
  const { argv, script } = command(installScript, "language-server", folder);
  const env = { SCRIPT: script, PACKAGE: manifest, LOCK: lock };
  const execId = `${LANGUAGE_SERVER}install-${unique()}`;
  const options = { env, execId, timeoutMs: INSTALL_MS, lingerMs: LINGER, helper: true };
  const exec = await tenant.exec(argv, options);
  let said = "";
  const decoder = new TextDecoder();
  for await (const { data } of exec.output())
    said = (said + decoder.decode(data, { stream: true })).slice(-SAID_MAX);
  const { code, reason } = await exec.exit;
  if (code !== 0)
    throw new Error(said.trim() || (reason === "timeout" ? "It took too long." : `npm ended with ${code}.`));
}
