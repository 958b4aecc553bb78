/** Deployments as their events report them: phases, times, log, outcome. */

import {
  type Deployment,
  type DeploymentRequest,
  GatewayError,
  type GatewayEvent,
  type TemplateInfo,
} from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { gateway, look, session, signedIn } from "./session.js";
import { complain } from "./toasts.js";

export const PHASES = [
  "validate",
  "create",
  "push",
  "install",
  "start",
  "expose",
  "route",
  "verify",
] as const;

export type PhaseState = "waiting" | "running" | "done" | "failed" | "undone";

export interface Phase {
  readonly name: string;
  readonly state: PhaseState;
  readonly ms: number | null;
}

export type DeployState = "running" | "succeeded" | "failed" | "cancelled";

export interface Deploy {
  readonly id: string;
  readonly tenant: string;
  readonly domain: string;
  readonly at: number;
  readonly state: DeployState;
  readonly undone: boolean;
  readonly phases: readonly Phase[];
  readonly log: readonly string[];
  readonly error: string | null;
  readonly ms: number | null;
}

const LINES = 2000;

export class Deploys {
  readonly list = signal<readonly Deploy[]>([]);
  readonly starting = signal(false);
  readonly failure = signal<string | null>(null);
  readonly templates = signal<readonly TemplateInfo[]>([]);
  #seen = 0;
  readonly #ending = new AbortController();

  /** Learns which templates there are. Without them a name can still be typed. */
  async look(): Promise<void> {
    try {
      this.templates.value = (await gateway.templates()).filter(({ error }) => error === undefined);
    } catch (error) {
      complain(error, "Listing templates");
    }
  }

  /** Starts one and follows it to its end. */
  async start(request: DeploymentRequest): Promise<void> {
    this.starting.value = true;
    this.failure.value = null;
    let deployment: Deployment;
    try {
      deployment = await gateway.deploy(request);
    } catch (error) {
      const known = error instanceof GatewayError && error.code === "not_found";
      this.failure.value = known
        ? "This gateway does not serve deployments."
        : error instanceof Error
          ? error.message
          : String(error);
      return;
    } finally {
      this.starting.value = false;
    }
    this.began(deployment, request.domain);
  }

  /** Follows one that has begun, to its end. */
  began(deployment: Deployment, domain: string): void {
    this.#change(deployment.id, { tenant: deployment.tenant, domain });
    void this.#follow(deployment);
  }

  async #follow(deployment: Deployment): Promise<void> {
    const { signal } = this.#ending;
    try {
      for await (const event of deployment.events(signal)) this.take(event);
    } catch (error) {
      if (error instanceof GatewayError && error.code === "unauthorized") {
        await look();
        if (session.value) await new Promise((resolve) => setTimeout(resolve, 3000)); // not again and again at once
        await signedIn(signal);
        if (!signal.aborted) void this.#follow(deployment); // what it tells again is known
        return;
      }
      this.#change(deployment.id, { error: error instanceof Error ? error.message : String(error) });
    }
  }

  async cancel(id: string): Promise<void> {
    await gateway.http("DELETE", `/v1/deployments/${encodeURIComponent(id)}`);
  }

  /** Takes an event, from whichever stream; one that came by the other before is known by its id. */
  take(event: GatewayEvent): void {
    if (!event.type.startsWith("deployment.")) return;
    const id = String(event.data.deployment ?? "");
    if (id === "" || this.#known(id, Number(event.id))) return;
    const { data } = event;
    const facts = {
      tenant: String(event.subject ?? data.tenant ?? ""),
      ...(typeof data.domain === "string" ? { domain: data.domain } : {}),
    };
    const phase = String(data.phase ?? "");
    const ms = typeof data.ms === "number" ? data.ms : null;
    switch (event.type.slice("deployment.".length)) {
      case "started":
        this.#change(id, { ...facts, at: Date.parse(event.time) });
        break;
      case "phase.started":
        this.#phase(id, phase, { state: "running" });
        break;
      case "phase.finished":
        this.#phase(id, phase, { state: data.error || data.isError ? "failed" : "done", ms });
        break;
      case "phase.progress":
      case "phase.log":
        this.#log(id, data);
        break;
      case "succeeded":
        this.#change(id, { ...facts, state: "succeeded", ms });
        break;
      case "failed":
        this.#fail(id, phase, message(data));
        this.#change(id, { ms });
        break;
      case "cancelled":
        this.#change(id, { ...facts, state: "cancelled", ms });
        break;
      case "rolledback":
        this.#change(id, {
          undone: true,
          ms,
          phases: this.#find(id).phases.map((entry) =>
            entry.state === "done" ? { ...entry, state: "undone" } : entry,
          ),
        });
        break;
    }
  }

  dispose(): void {
    this.#ending.abort();
  }

  readonly #lasts = new Map<string, number>();

  #known(id: string, event: number): boolean {
    if (event <= (this.#lasts.get(id) ?? -1)) return true;
    this.#lasts.set(id, event);
    this.#seen = Math.max(this.#seen, event);
    return false;
  }

  #find(id: string): Deploy {
    return (
      this.list.value.find((deploy) => deploy.id === id) ?? {
        id,
        tenant: "",
        domain: "",
        at: Date.now(),
        state: "running",
        undone: false,
        phases: PHASES.map((name) => ({ name, state: "waiting", ms: null })),
        log: [],
        error: null,
        ms: null,
      }
    );
  }

  #change(id: string, change: Partial<Deploy>): void {
    const changed = { ...this.#find(id), ...change };
    const others = this.list.value.filter((deploy) => deploy.id !== id);
    this.list.value = [changed, ...others].sort((a, b) => b.at - a.at).slice(0, 20);
  }

  #phase(id: string, name: string, change: Partial<Phase>): void {
    const { phases } = this.#find(id);
    const known = phases.some((phase) => phase.name === name);
    const all = known ? phases : [...phases, { name, state: "waiting", ms: null } as const];
    this.#change(id, { phases: all.map((phase) => (phase.name === name ? { ...phase, ...change } : phase)) });
  }

  #log(id: string, data: Readonly<Record<string, unknown>>): void {
    const text = data.line ?? data.text ?? data.message ?? data.lines;
    const lines = Array.isArray(text) ? text.map(String) : text === undefined ? [] : String(text).split("\n");
    if (lines.length > 0) this.#change(id, { log: [...this.#find(id).log, ...lines].slice(-LINES) });
  }

  #fail(id: string, phase: string, error: string): void {
    const { phases } = this.#find(id);
    this.#change(id, {
      state: "failed",
      error,
      phases: phases.map((entry) =>
        entry.name === phase || entry.state === "running" ? { ...entry, state: "failed" } : entry,
      ),
    });
  }
}

function message(data: Readonly<Record<string, unknown>>): string {
  const { error } = data;
  if (typeof error === "object" && error !== null)
    return String((error as { message?: unknown }).message ?? "");
  return String(data.message ?? error ?? data.reason ?? "");
}
