/** The output of an agent's Bash calls while they run, by the gateway's events and separate attachments. */

import { GatewayError } from "./errors.js";
import type { TenantEvents } from "./feed.js";
import type { StreamName } from "./output.js";
import type { Tenant } from "./tenant.js";
import type { ToolResult } from "./tools.js";

/** A piece of a Bash call's output while it runs. `call` is the model's id of the call, `toolu_…`. */
export interface Printed {
  readonly call: string;
  readonly stream: StreamName;
  readonly data: Uint8Array;
}

export type OnOutput = (printed: Printed) => void | Promise<void>;

/** How long a result waits for the delivery of its last live output, in milliseconds. */
const DRAIN = 5_000;

export class LiveOutput {
  readonly #tenant: Tenant;
  readonly #onOutput: OnOutput;
  readonly #expected = new Set<string>();
  /** Call ids by exec, before it has started. */
  readonly #starting = new Map<string, string>();
  readonly #followed = new Map<string, Promise<void>>();
  #events: TenantEvents | null = null;

  /** `tenant` is not shared, and closed with this object. */
  constructor(tenant: Tenant, onOutput: OnOutput) {
    this.#tenant = tenant;
    this.#onOutput = onOutput;
  }

  async open(): Promise<void> {
    if (this.#events !== null) return;
    try {
      this.#events = await this.#tenant.events({ types: ["tool.started", "exec.started"] });
      void this.#listen(this.#events);
    } catch (error) {
      warn("output comes only at a call's end, since there are no events", error);
    }
  }

  close(): void {
    this.#tenant.close();
  }

  /** Follows the command of this call as soon as it starts. */
  expect(call: string): void {
    this.#expected.add(call);
  }

  forget(call: string): void {
    this.#expected.delete(call);
  }

  /** Waits until all output of an ended command has been delivered. */
  async finish(call: string, { structuredContent: { exec, status } }: ToolResult): Promise<void> {
    if (typeof exec !== "string") return;
    // a short command may have ended before its start is reported; do not follow it then
    this.#expected.delete(call);
    this.#starting.delete(exec);
    const following = this.#follow(call, exec);
    void following.then(() => this.#followed.delete(exec));
    if (status === "running") return;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, DRAIN);
    });
    await Promise.race([following, late]);
    clearTimeout(timer);
  }

  async #listen(events: TenantEvents): Promise<void> {
    try {
      for await (const { type, data } of events) {
        const exec = String(data.exec);
        if (type === "tool.started" && this.#expected.has(String(data.callId)))
          this.#starting.set(exec, String(data.callId));
        else if (type === "exec.started") {
          const call = this.#starting.get(exec);
          this.#starting.delete(exec);
          if (call !== undefined) void this.#follow(call, exec);
        }
      }
    } catch (error) {
      if (this.#tenant.status.state !== "closed") warn("output comes only at a call's end", error);
    }
  }

  #follow(call: string, exec: string): Promise<void> {
    const following = this.#followed.get(exec) ?? this.#handOver(call, exec);
    this.#followed.set(exec, following);
    return following;
  }

  async #handOver(call: string, exec: string): Promise<void> {
    try {
      const command = await this.#tenant.attach(exec);
      try {
        for await (const { stream, data } of command.output()) await this.#onOutput({ call, stream, data });
      } finally {
        await command.detach();
      }
    } catch (error) {
      if (this.#tenant.status.state === "closed") return;
      const what =
        error instanceof GatewayError ? "could not be followed" : "is not delivered: onOutput failed";
      warn(`the output of exec ${exec} ${what}`, error);
    }
  }
}

export function warn(words: string, error: unknown): void {
  console.warn(`incus-gateway: ${words}: ${error instanceof Error ? error.message : error}`);
}
