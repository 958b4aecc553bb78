/**
 * The tenant's tools as an in-process MCP server for the Agent SDK: JSON-RPC messages over its transport. The CLI uses
 * only these few methods. The tools' schemas are the gateway's JSON; the package `@modelcontextprotocol/sdk` would need
 * them in the library zod.
 */

import { LiveOutput, type OnOutput, warn } from "./claude-output.js";
import type { Permissions } from "./claude-permissions.js";
import { GatewayError } from "./errors.js";
import type { Tenant } from "./tenant.js";
import { ToolResult } from "./tools.js";
import type { ToolInfo } from "./types.js";

export type { OnOutput, Printed } from "./claude-output.js";

interface Message {
  readonly id?: string | number;
  readonly method?: string;
  readonly params?: Readonly<Record<string, unknown>>;
}

/** The SDK's transport. */
interface Transport {
  onmessage?: (message: never) => void;
  onclose?: () => void;
  start(): Promise<void>;
  send(message: object): Promise<void>;
}

interface Settings {
  readonly onOutput: OnOutput | undefined;
  readonly lingerMs: number;
  readonly permissions: Permissions;
  /** Where Bash stands at the beginning of a conversation; undefined in one that goes on. */
  readonly begin: string | undefined;
}

/** Tenants, each one tool session, that an agent of this process has worked in. */
const BEGUN = new WeakSet<Tenant>();

const READ_ONLY = ["Read", "Glob", "Grep"];
/**
 * UTF-16 units of a result's text. Over 500 000 the CLI writes it to a file on this host and shows 2 KB of it; over
 * some 10 000 it cuts the middle out of an error. So both are cut here, with a helpful note.
 */
const RESULT_MAX = 490_000;
const ERROR_MAX = 10_000;
const CALL_ID = "claudecode/toolUseId";
/** Instead of an embedded file: the CLI would store it on this host, and show the model a path out of its reach. */
const UNSHOWN =
  "The file itself cannot be shown here: its pages are returned as images once the gateway's operator has installed " +
  "the extra `pdf`. Until then a program in the container may be able to read it.";

export class ToolServer {
  readonly #tenant: Tenant;
  readonly #settings: Settings;

  constructor(tenant: Tenant, settings: Settings) {
    this.#tenant = tenant;
    this.#settings = settings;
  }

  /** Serves one agent until its transport closes, which cancels its running calls. */
  async connect(transport: Transport): Promise<void> {
    const conversation = new Conversation(this.#tenant, this.#settings, transport);
    transport.onmessage = (message: Message) => void conversation.received(message);
    transport.onclose = () => conversation.close();
    await transport.start();
  }
}

/** One agent's calls. */
class Conversation {
  readonly #tenant: Tenant;
  readonly #settings: Settings;
  readonly #transport: Transport;
  readonly #calls = new Map<string | number, AbortController>();
  readonly #live: LiveOutput | null;
  /** Whether Bash may stand where an earlier conversation left it, and what takes it back. */
  #away: boolean;
  #back: Promise<unknown> | null = null;

  constructor(tenant: Tenant, settings: Settings, transport: Transport) {
    const { onOutput } = settings;
    this.#tenant = tenant;
    this.#settings = settings;
    this.#transport = transport;
    this.#away = settings.begin !== undefined && (tenant.named || BEGUN.has(tenant));
    BEGUN.add(tenant);
    this.#live = onOutput === undefined ? null : new LiveOutput(tenant.twin(), onOutput);
  }

  async received({ id, method, params = {} }: Message): Promise<void> {
    if (method === undefined) return; // an answer, and we ask nothing
    if (method === "notifications/cancelled") {
      this.#calls.get(params.requestId as string | number)?.abort();
      return;
    }
    if (id === undefined) return;
    let answer: object;
    try {
      answer = { result: await this.#answer(id, method, params) };
    } catch (error) {
      const message = error instanceof Error ? error.message : String(error);
      // the CLI goes on without them and reports nothing
      if (method === "tools/list") warn("the agent has none of the tenant's tools", error);
      answer = { error: { code: error instanceof UnknownMethod ? -32601 : -32603, message } };
    }
    // the other end is closed
    await this.#transport.send({ jsonrpc: "2.0", id, ...answer }).catch(() => {});
  }

  close(): void {
    for (const call of this.#calls.values()) call.abort();
    this.#live?.close();
  }

  async #answer(id: string | number, method: string, params: Message["params"] & object): Promise<object> {
    switch (method) {
      case "initialize":
        return {
          protocolVersion: params.protocolVersion,
          capabilities: { tools: {} },
          serverInfo: { name: "incus-gateway", version: "1" },
        };
      case "ping":
        return {};
      case "tools/list":
        await this.#live?.open(); // before any call is made: it gets all events from here on
        return { tools: (await this.#tenant.tools()).map(described) };
      case "tools/call":
        return await this.#call(id, params);
      default:
        throw new UnknownMethod(`there is no method ${method}`);
    }
  }

  async #call(id: string | number, params: Message["params"] & object): Promise<object> {
    const { name, arguments: args = {}, _meta: meta } = params;
    const { lingerMs, permissions } = this.#settings;
    const given = args as Record<string, unknown>;
    const refusal = permissions.refusal(String(name), given);
    const instead =
      refusal === null ? permissions.planned(String(name), given) : { text: refusal, isError: true };
    if (instead !== null) {
      const { text, isError } = instead;
      return answered(new ToolResult([{ type: "text", text }], isError));
    }
    const callId = (meta as Record<string, string> | undefined)?.[CALL_ID];
    const ending = new AbortController();
    this.#calls.set(id, ending);
    try {
      if (this.#away) {
        this.#away = false;
        const command = `cd '${this.#settings.begin?.replaceAll("'", "'\\''")}'`;
        this.#back = this.#tenant.tool("Bash", { command }).catch(() => {});
      }
      await this.#back;
      if (callId !== undefined) this.#live?.expect(callId);
      const options = { callId, lingerMs, signal: ending.signal };
      const result = await this.#tenant.tool(String(name), given, options);
      if (callId !== undefined && name === "Bash") await this.#live?.finish(callId, result);
      return answered(result);
    } catch (error) {
      if (!(error instanceof GatewayError)) throw error;
      // the model can report it, or try something else
      return answered(new ToolResult([{ type: "text", text: error.message }], true));
    } finally {
      this.#calls.delete(id);
      if (callId !== undefined) this.#live?.forget(callId);
    }
  }
}

class UnknownMethod extends Error {}

/** Read-only tools are marked so that the CLI runs them in parallel. */
function described({ name, description, inputSchema }: ToolInfo): object {
  const readOnly = READ_ONLY.includes(name);
  return {
    name,
    description,
    inputSchema,
    annotations: { readOnlyHint: readOnly, destructiveHint: !readOnly },
    // without alwaysLoad the tools would be hidden behind a search if other servers have many
    _meta: { "anthropic/maxResultSizeChars": 500_000, "anthropic/alwaysLoad": true },
  };
}

/** Results have no structuredContent, since the CLI would show that to the model instead of the text. */
function answered(result: ToolResult): object {
  const content: object[] = [];
  let room = result.isError ? ERROR_MAX : RESULT_MAX;
  for (const part of result.content) {
    if (part.type === "image") content.push(part);
    else if (part.type === "text") {
      const text = cut(part.text, room, result.isError);
      room = Math.max(0, room - text.length);
      content.push({ type: "text", text });
    } else return { content: [{ type: "text", text: UNSHOWN }], isError: true };
  }
  return { content, isError: result.isError };
}

/** Cuts `text` to `limit` UTF-16 units: to its beginning, or to its two ends. */
export function cut(text: string, limit: number, middle: boolean): string {
  if (text.length <= limit) return text;
  let note = `\n\n... [${text.length - limit} characters truncated] ...\n\n`;
  if (!middle) note += "Ask for less at a time: a range of lines, a narrower pattern.";
  const keep = Math.max(0, limit - note.length);
  const tail = middle ? Math.floor(keep / 2) : 0;
  // drop half of a surrogate pair
  const head = text.slice(0, keep - tail).replace(/[\ud800-\udbff]$/, "");
  return head + note + text.slice(text.length - tail).replace(/^[\udc00-\udfff]/, "");
}
