/** A tenant's metrics, sampled while they are visible, and its site's log. */

import { GatewayError, type Tenant, type Usage } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { look, signedIn } from "./session.js";

export interface Sample {
  readonly at: number;
  /** Of one processor, in percent. */
  readonly cpu: number | null;
  readonly memory: number | null;
  readonly processes: number | null;
  readonly received: number | null;
  readonly sent: number | null;
}

const PERIOD = 2000;
const KEPT = 90;
const LINES = 2000;

export class Insights {
  readonly #tenant: () => Tenant;
  readonly samples = signal<readonly Sample[]>([]);
  readonly usage = signal<Usage | null>(null);
  readonly failure = signal<string | null>(null);
  readonly lines = signal<readonly string[]>([]);
  readonly following = signal(false);
  readonly logFailure = signal<string | null>(null);
  #last: { at: number; usage: Usage } | null = null;

  constructor(tenant: () => Tenant) {
    this.#tenant = tenant;
  }

  /** Samples until the signal aborts. */
  async watch(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      await signedIn(signal);
      if (document.visibilityState === "visible" && !signal.aborted) await this.#sample(signal);
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, PERIOD);
        signal.addEventListener("abort", () => {
          clearTimeout(timer);
          resolve();
        });
      });
    }
  }

  async #sample(signal: AbortSignal): Promise<void> {
    try {
      const usage = await this.#tenant().metrics(signal);
      const at = performance.now();
      const last = this.#last;
      const seconds = last === null ? 0 : (at - last.at) / 1000;
      const rate = (now: number | undefined, before: number | undefined) =>
        seconds <= 0 || seconds > 30 || now === undefined || before === undefined
          ? null
          : Math.max(0, (now - before) / seconds);
      const cpu = rate(usage.cpu_seconds, last?.usage.cpu_seconds);
      const total = (of: Usage | undefined, key: "received_bytes" | "sent_bytes") =>
        of?.network === undefined
          ? undefined
          : Object.entries(of.network).reduce(
              (sum, [name, net]) => (name === "lo" ? sum : sum + net[key]),
              0,
            );
      const sample: Sample = {
        at: Date.now(),
        cpu: cpu === null ? null : cpu * 100,
        memory: usage.memory_bytes ?? null,
        processes: usage.processes ?? null,
        received: rate(total(usage, "received_bytes"), total(last?.usage, "received_bytes")),
        sent: rate(total(usage, "sent_bytes"), total(last?.usage, "sent_bytes")),
      };
      this.#last = { at, usage };
      this.usage.value = usage;
      this.failure.value = null;
      this.samples.value = [...this.samples.value, sample].slice(-KEPT);
    } catch (error) {
      if (signal.aborted || ended(error)) return;
      this.failure.value = error instanceof Error ? error.message : String(error);
    }
  }

  /** Follows the site's journal until the signal aborts. */
  async follow(signal: AbortSignal): Promise<void> {
    this.lines.value = [];
    while (!signal.aborted) {
      await signedIn(signal);
      if (signal.aborted) return;
      try {
        this.following.value = true;
        let batch: string[] = [];
        const flush = () => {
          if (batch.length === 0) return;
          this.lines.value = [...this.lines.value, ...batch].slice(-LINES);
          batch = [];
        };
        const timer = setInterval(flush, 80);
        try {
          for await (const line of this.#tenant().logs({ lines: 200, follow: true, signal }))
            batch.push(line);
        } finally {
          clearInterval(timer);
          flush();
        }
        this.logFailure.value = null;
      } catch (error) {
        if (signal.aborted) return;
        const over = ended(error);
        if (over) await look();
        const missing = error instanceof GatewayError && error.code === "not_found";
        this.logFailure.value = over
          ? null
          : missing
            ? "This gateway does not serve the site's journal."
            : error instanceof Error
              ? error.message
              : String(error);
        if (missing) return;
      } finally {
        this.following.value = false;
      }
      await new Promise((resolve) => setTimeout(resolve, 3000));
      if (!signal.aborted) this.lines.value = [];
    }
  }
}

/** The window reports that a session has ended, not this view. */
function ended(error: unknown): boolean {
  return error instanceof GatewayError && error.code === "unauthorized";
}
