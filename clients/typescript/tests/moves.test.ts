/** A move is over once the gateway says so, whatever it answers while the tenant is on its way. */

import { expect, test } from "vitest";
import { Gateway } from "../src/index.js";

const record = (state: string, more = {}) => ({ id: "2", state, ...more });
const problem = (status: number) => new Response(JSON.stringify({ detail: "on its way" }), { status });

/** A tenant whose gateway answers these, one after the other. */
function answering(...answers: (object | Response)[]) {
  const fetching = async () => {
    const answer = answers.shift();
    return answer instanceof Response ? answer : new Response(JSON.stringify(answer));
  };
  const gateway = new Gateway("http://gateway", { token: "t", fetch: fetching as typeof fetch });
  return { tenant: gateway.tenant("shop"), answers };
}

test("waits for its end", async () => {
  const before = { ...record("moved"), id: "1" };
  const answers = [record("waiting"), before, problem(404), problem(503), record("copying"), record("moved")];
  const { tenant, answers: left } = answering(...answers);
  expect(await tenant.move("m2")).toEqual(record("moved"));
  expect(left).toEqual([]);
});

test("throws why the tenant stays", async () => {
  const error = { code: "unavailable", message: "no room", reason: "capacity" };
  const { tenant } = answering(record("waiting"), record("failed", { error }));
  await expect(tenant.move("m2")).rejects.toMatchObject({
    message: "no room",
    facts: { reason: "capacity" },
  });
});

test("throws what no waiting mends", async () => {
  const { tenant } = answering(record("waiting"), problem(403));
  await expect(tenant.move("m2")).rejects.toMatchObject({ code: "forbidden" });
});
