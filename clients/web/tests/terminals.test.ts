import { GatewayError, type GatewayEvent, type Tenant } from "@incus-gateway/client";
import { expect, test, vi } from "vitest";
import { control, Terminals } from "../src/editor/state/terminals.js";
import type { Screen } from "../src/editor/terminal/screen.js";

test.each([
  ["c", "\x03"],
  ["D", "\x04"],
  ["[", "\x1b"],
  ["5", "5"],
])("Ctrl makes of %j what a terminal expects", (letter, sent) => {
  expect(control(letter)).toBe(sent);
});

/** A tenant that is away until `up`. */
function away() {
  const state = { up: false, starts: 0 };
  const tenant = {
    exec: async () => {
      if (!state.up) throw new GatewayError("tenant_not_running", "shop is stopped");
      state.starts += 1;
      const forever = new Promise<never>(() => {});
      return {
        on: () => {},
        output: () => ({ [Symbol.asyncIterator]: () => ({ next: () => forever }) }),
        exit: forever,
        write: async () => {},
      };
    },
  } as unknown as Tenant;
  return { state, tenant };
}

function started(time = Date.now()): GatewayEvent {
  return {
    specversion: "1.0",
    id: "1",
    type: "tenant.started",
    source: "/",
    time: new Date(time).toISOString(),
    data: {},
  };
}

const screen = { size: { cols: 80, rows: 24 }, note: vi.fn(), write: async () => {} } as unknown as Screen;

test("a shell that its tenant's stop took starts anew when the tenant does, and at Enter", async () => {
  const { state, tenant } = away();
  const terminals = new Terminals(() => tenant, "shop");
  const terminal = terminals.open(true);
  await terminals.run(terminal, screen);
  expect(terminal.state.value).toBe("lost");
  terminals.input(terminal, "x"); // no other key
  terminals.take(started(Date.now() - 600_000)); // nor what is told of the past
  expect(terminal.state.value).toBe("lost");
  terminals.input(terminal, "\r");
  await vi.waitFor(() => expect(terminal.state.value).toBe("lost"));
  state.up = true;
  terminals.take(started());
  await vi.waitFor(() => expect(terminal.state.value).toBe("running"));
  terminals.take(started());
  expect(state.starts).toBe(1);
});
