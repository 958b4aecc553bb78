/** One deployment: its request, events and end. */

import { base64 } from "./base64.js";
import { GatewayError } from "./errors.js";
import type { HttpClient } from "./http.js";
import type { DeploymentRecord, DeploymentStarted, GatewayEvent } from "./types.js";

export interface DeploymentRequest {
  readonly domain: string;
  /** The name of one of the gateway's, or a tar of a folder: `packed` of `…/folder` makes one. */
  readonly template: string | Uint8Array;
  readonly size?: string | undefined;
  readonly env?: Readonly<Record<string, string>> | undefined;
  /** Default: derived from the domain. */
  readonly tenant?: string | undefined;
  /** What of the folder goes before its `site.toml` and what is found of it; an empty `install` installs nothing. */
  readonly start?: string | readonly string[] | undefined;
  readonly install?: string | readonly string[] | undefined;
  readonly port?: number | undefined;
  /** Production builds it, and serves what was built. */
  readonly mode?: "dev" | "production" | undefined;
  /** An update keeps what the site has written into its folder, such as a database, unless this is true. */
  readonly clean?: boolean | undefined;
}

/** A failed or cancelled deployment ends once it is undone. */
const ENDINGS = new Set(["deployment.succeeded", "deployment.rolledback"]);
/** How long to wait for the stored events of an ended deployment, in milliseconds. */
const SETTLE = 5_000;

/** The part of `Gateway` that a deployment uses. */
interface Events extends HttpClient {
  events(filter: object): AsyncGenerator<GatewayEvent>;
}

/** One attempt to deploy a site. It runs in the gateway, with or without a client. */
export class Deployment {
  readonly id: string;
  readonly tenant: string;
  readonly #gateway: Events;

  /** @internal Use `Gateway.deploy` and `Gateway.deployment`. */
  constructor(
    gateway: Events,
    readonly started: DeploymentStarted,
  ) {
    this.#gateway = gateway;
    this.id = started.id;
    this.tenant = started.tenant;
  }

  /** Returns its current state. */
  record(signal?: AbortSignal): Promise<DeploymentRecord> {
    return this.#gateway.json("GET", this.#path, undefined, { signal });
  }

  /** Cancels it, and returns once it is undone. */
  cancel(signal?: AbortSignal): Promise<DeploymentRecord> {
    return this.#gateway.json("DELETE", this.#path, undefined, { signal });
  }

  /** Waits for its end. Throws the error of a failure, once all is undone. Needs the scope `events`. */
  async wait(signal?: AbortSignal): Promise<DeploymentRecord> {
    for (;;) {
      const record = await this.record(signal);
      if (record.error !== null && record.state === "rolledback") {
        const { code, message, ...facts } = record.error;
        throw new GatewayError(code, message, facts);
      }
      if (record.state === "succeeded" || record.state === "rolledback") return record;
      for await (const _ of this.events(signal));
      if (signal?.aborted) throw new GatewayError("cancelled", "the request was cancelled");
    }
  }

  /**
   * Yields its events from the first stored one on, up to its last. If the last is no longer stored, it ends some
   * seconds after the others.
   */
  async *events(signal?: AbortSignal): AsyncGenerator<GatewayEvent> {
    const ending = new AbortController();
    const abort = () => ending.abort();
    signal?.addEventListener("abort", abort);
    if (signal?.aborted) abort();
    let timer: ReturnType<typeof setTimeout> | undefined;
    try {
      const filter = { deployments: [this.id], lastEventId: 0, insist: true, signal: ending.signal };
      for await (const event of this.#gateway.events(filter)) {
        if (event.type === "gap" && timer === undefined) {
          const { state } = await this.record(ending.signal);
          if (state === "succeeded" || state === "rolledback") timer = setTimeout(abort, SETTLE);
        }
        yield event;
        if (ENDINGS.has(event.type)) return;
      }
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", abort);
    }
  }

  get #path(): string {
    return `/v1/deployments/${encodeURIComponent(this.id)}`;
  }
}

/** Returns a template for a request: a name unchanged, a tar as an archive. */
export function templateBody(template: string | Uint8Array): string | { readonly archive: string } {
  return typeof template === "string" ? template : { archive: base64(template) };
}
