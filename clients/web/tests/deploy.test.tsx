import type { Tenant } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { render } from "preact";
import { act } from "preact/test-utils";
import { expect, test } from "vitest";
import type { Deploys } from "../src/editor/state/deploys.js";
import { session } from "../src/editor/state/session.js";
import { Site } from "../src/editor/state/site.js";
import type { Workspace } from "../src/editor/state/workspace.js";
import { DeployView } from "../src/editor/ui/deploy.js";

function workspace(name: string): Workspace {
  const deploys = {
    ...{ list: signal([]), templates: signal([]), starting: signal(false), failure: signal(null) },
    look: async () => {},
  } as unknown as Deploys;
  const deployed = { deployments: [], live: null, kept: [] };
  const tenant = {
    deployments: async () => deployed,
    snapshots: async () => [],
    variables: async () => [],
  } as unknown as Tenant;
  const site = new Site(() => tenant, deploys);
  return { name, site, deploys, info: signal({ domain: `${name}.test` }) } as unknown as Workspace;
}

test("what was typed for one tenant is not in the forms of the next", async () => {
  session.value = { subject: "ann", scopes: ["deploy"], tenants: [], expires: 2e9 };
  const place = document.createElement("div");
  const show = (current: Workspace) => act(() => render(<DeployView current={current} />, place));
  const texts = () =>
    [...place.querySelectorAll<HTMLInputElement>(".site-view input:not([type])")].map(({ value }) => value);
  await show(workspace("shop"));
  const before = texts();
  await act(() => {
    for (const input of place.querySelectorAll<HTMLInputElement>(".site-view input:not([type])")) {
      input.value = "SECRET";
      input.dispatchEvent(new Event("input"));
    }
  });
  expect(new Set(texts())).toEqual(new Set(["SECRET"]));
  await show(workspace("desk"));
  expect(texts()).toEqual(before.map((text) => text.replace("shop", "desk")));
  expect(texts().length).toBeGreaterThan(4);
});
