/** What is deployed to the open tenant and kept of it, and what can be done with that. */

import type { Deployment, DeploymentHistory, SnapshotInfo, Tenant } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import type { Deploys } from "./deploys.js";
import { allows } from "./session.js";

export class Site {
  readonly #tenant: () => Tenant;
  readonly #deploys: Deploys;
  readonly deployed = signal<DeploymentHistory | null>(null);
  readonly snapshots = signal<readonly SnapshotInfo[]>([]);
  /** The names of the site's environment, with their values once somebody asked for these. */
  readonly variables = signal<Readonly<Record<string, string | null>>>({});
  /** What is under way, in words. */
  readonly doing = signal<string | null>(null);
  readonly failure = signal<string | null>(null);
  /** It is being destroyed: there is nothing to look at any more. */
  leaving = false;

  constructor(tenant: () => Tenant, deploys: Deploys) {
    this.#tenant = tenant;
    this.#deploys = deploys;
  }

  /** Loads everything again. */
  async look(): Promise<void> {
    if (!allows("deploy") || this.leaving) return;
    const tenant = this.#tenant();
    const told = await Promise.allSettled([
      tenant.deployments().then((found) => {
        this.deployed.value = found;
      }),
      tenant.snapshots().then((found) => {
        this.snapshots.value = found;
      }),
      tenant.variables().then((names) => {
        const known = this.variables.value;
        this.variables.value = Object.fromEntries(names.map((name) => [name, known[name] ?? null]));
      }),
    ]);
    const failed = told.find((one) => one.status === "rejected");
    if (failed !== undefined) this.failure.value = said(failed.reason);
  }

  /** Does something and loads everything again; returns whether it was done. */
  async #do(doing: string, work: (tenant: Tenant) => Promise<unknown>): Promise<boolean> {
    this.doing.value = doing;
    this.failure.value = null;
    try {
      await work(this.#tenant());
      void this.look();
      return true;
    } catch (error) {
      this.failure.value = said(error);
      void this.look();
      return false;
    } finally {
      this.doing.value = null;
    }
  }

  #begin(doing: string, domain: string, work: (tenant: Tenant) => Promise<Deployment>): Promise<boolean> {
    return this.#do(doing, async (tenant) => this.#deploys.began(await work(tenant), domain));
  }

  rollback(domain: string, to: string): Promise<boolean> {
    return this.#begin("Rolling back", domain, (tenant) => tenant.rollback(to));
  }

  publish(domain: string): Promise<boolean> {
    return this.#begin("Publishing", domain, (tenant) => tenant.publish(domain));
  }

  /** Sets a variable, or removes it by null; the site restarts with it. */
  setVariable(domain: string, name: string, value: string | null): Promise<boolean> {
    return this.#begin("Changing the environment", domain, (tenant) =>
      tenant.changeEnvironment({ [name]: value }),
    );
  }

  showValues(): Promise<boolean> {
    return this.#do("Reading", async (tenant) => {
      this.variables.value = await tenant.environment();
    });
  }

  hideValues(): void {
    this.variables.value = Object.fromEntries(Object.keys(this.variables.value).map((name) => [name, null]));
  }

  rename(domain: string | null): Promise<boolean> {
    return this.#do("Changing the domain", (tenant) => tenant.rename(domain));
  }

  snapshot(name: string): Promise<boolean> {
    return this.#do("Taking a snapshot", (tenant) => tenant.snapshot(name === "" ? undefined : name));
  }

  restore(snapshot: string): Promise<boolean> {
    return this.#do(`Restoring ${snapshot}`, (tenant) => tenant.restore(snapshot));
  }

  deleteSnapshot(snapshot: string): Promise<boolean> {
    return this.#do(`Deleting ${snapshot}`, (tenant) => tenant.deleteSnapshot(snapshot));
  }

  clone(name: string, snapshot: string | null): Promise<boolean> {
    return this.#do(`Cloning to ${name}`, async (tenant) =>
      (await tenant.clone(name, { snapshot: snapshot ?? undefined })).close(),
    );
  }

  destroy(): Promise<boolean> {
    return this.#do("Destroying", async (tenant) => {
      this.leaving = true;
      await tenant.delete().catch((error) => {
        this.leaving = false;
        throw error;
      });
    });
  }
}

function said(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
