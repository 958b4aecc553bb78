/** A feed of events goes on where it stood, also where its tenant has come to another member. */

import { expect, test } from "vitest";
import type { Connection } from "../src/connection.js";
import { TenantEvents } from "../src/feed.js";
import type { Link } from "../src/link.js";

/** A connection to a gateway that answers `events/subscribe` with this, and what it was asked. */
function subscribed(result: object) {
  const asked: object[] = [];
  const request = async (_: string, params: object, took: (result: object) => void) => {
    asked.push(params);
    took({ subscription: 1, ...result });
  };
  return { asked, connection: { request } as unknown as Connection };
}

async function begun(result: object) {
  const { connection } = subscribed(result);
  const nothing = async () => {};
  const link = { opened: async () => connection, add: nothing, remove: nothing, request: nothing };
  return await new TenantEvents(link as unknown as Link, {}).begin();
}

const told = (member: string, id: number, type = "t") => ({
  kind: "notification" as const,
  method: "event",
  params: { type, id: String(id), source: `/gateway/${member}` },
});

test("by the member's name and the id of its last event", async () => {
  const events = await begun({ lastEventId: 70, position: "m1:70" });
  expect(events.position).toBe("m1:70");
  events.notified(told("m1", 71));
  events.notified(told("m1", 71)); // again
  const { asked, connection } = subscribed({ lastEventId: 3, position: "m2:3" });
  await events.resume(connection);
  expect(asked).toEqual([{ lastEventId: "m1:71" }]);
  events.notified(told("m2", 3, "gap"));
  events.notified(told("m2", 4));
  expect(events.position).toBe("m2:4");
  events.close();
  const seen: string[] = [];
  for await (const { id } of events) seen.push(id);
  expect(seen).toEqual(["71", "3", "4"]);
});

test.each([{}, { position: "70" }])("without a cluster by a number", async (more) => {
  const events = await begun({ lastEventId: 70, ...more });
  events.notified(told("gateway", 71));
  const { asked, connection } = subscribed({ lastEventId: 71, ...more });
  await events.resume(connection);
  expect(asked).toEqual([{ lastEventId: 71 }]);
  events.close();
});
