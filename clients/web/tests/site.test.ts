import { type Deployment, GatewayError, type Tenant } from "@incus-gateway/client";
import { beforeEach, expect, test, vi } from "vitest";
import type { Deploys } from "../src/editor/state/deploys.js";
import { session } from "../src/editor/state/session.js";
import { Site } from "../src/editor/state/site.js";

const calls: string[] = [];
const began = vi.fn();
let refuse: GatewayError | null = null;
let site: Site;

beforeEach(() => {
  calls.length = 0;
  began.mockClear();
  refuse = null;
  session.value = { subject: "ann", scopes: ["deploy", "exec"], tenants: ["shop"], expires: 2e9 };
  const answers: Record<string, unknown> = {
    deployments: { deployments: [], live: null, kept: [] },
    snapshots: [],
    variables: ["A", "B"],
    environment: { A: "1", B: "2" },
    clone: { close: () => {} },
  };
  const tenant = new Proxy({} as Tenant, {
    get:
      (_target, name: string) =>
      async (...args: unknown[]) => {
        if (refuse !== null && !(name in answers)) throw refuse;
        calls.push(`${name} ${JSON.stringify(args)}`);
        return answers[name] ?? ({ id: "d1", tenant: "shop" } as Deployment);
      },
  });
  site = new Site(() => tenant, { began } as unknown as Deploys);
});

test.each([
  ["rollback", () => site.rollback("d.localhost", "d0"), 'rollback ["d0"]'],
  ["publish", () => site.publish("www.example.com"), 'publish ["www.example.com"]'],
  ["a variable", () => site.setVariable("d.localhost", "A", null), 'changeEnvironment [{"A":null}]'],
])("%s is a deployment that is followed", async (_name, act, call) => {
  expect(await act()).toBe(true);
  expect(calls).toContain(call);
  expect(began).toHaveBeenCalledOnce();
});

test.each([
  ["rename", () => site.rename(null), "rename [null]"],
  ["snapshot", () => site.snapshot(""), "snapshot [null]"],
  ["restore", () => site.restore("s"), 'restore ["s"]'],
  ["destroy", () => site.destroy(), "delete []"],
])("%s asks the gateway once", async (_name, act, call) => {
  expect(await act()).toBe(true);
  expect(calls.filter((made) => made === call)).toHaveLength(1);
  expect(began).not.toHaveBeenCalled();
});

test("a refusal is told, and what is shown is read anew", async () => {
  refuse = new GatewayError("conflict", "a deployment of shop runs already; wait for it, or cancel it");
  expect(await site.rollback("d.localhost", "d0")).toBe(false);
  expect(site.failure.value).toContain("wait for it");
  await vi.waitFor(() => expect(calls.some((call) => call.startsWith("deployments"))).toBe(true));
});

test("values of the environment are read only when asked for, and let go of", async () => {
  await site.look();
  expect(site.variables.value).toEqual({ A: null, B: null });
  await site.showValues();
  expect(site.variables.value).toEqual({ A: "1", B: "2" });
  site.hideValues();
  expect(site.variables.value).toEqual({ A: null, B: null });
});
