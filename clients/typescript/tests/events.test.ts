/** A stream of events is resumed by the text of its last `id:`, whatever that is. */

import { expect, test } from "vitest";
import { Gateway } from "../src/index.js";

const event = (id: string, number: number) =>
  `id: ${id}\nevent: t\ndata: {"specversion":"1.0","id":"${number}","source":"/gateway/m2","type":"t","data":{}}\n\n`;

test("an id over several members is sent back as it came, also before the first event", async () => {
  const asked: (string | null)[] = [];
  const answers = [
    "id: m1:17,m2:4\n\n",
    event("m1:17,m2:5", 5) + event("m1:17,m2:6", 6),
    event("m1:17,m2:7", 7),
  ];
  const fetching = async (_: string, { headers }: { headers: Record<string, string> }) => {
    asked.push(new Headers(headers).get("Last-Event-ID"));
    return new Response(answers[asked.length - 1] ?? "");
  };
  const gateway = new Gateway("http://gateway", { token: "t", fetch: fetching as unknown as typeof fetch });
  const ids: string[] = [];
  for await (const { id } of gateway.events()) if (ids.push(id) === 3) break;
  expect(ids).toEqual(["5", "6", "7"]);
  expect(asked).toEqual([null, "m1:17,m2:4", "m1:17,m2:6"]);
});
