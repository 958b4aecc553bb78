import type { GatewayEvent, Tenant, Turn } from "@incus-gateway/client";
import { expect, test } from "vitest";
import { History } from "../src/editor/state/history.js";

const turn = (id: string) => ({ turn: id, title: `Turn ${id}` }) as Turn;
const committed = (id: string) => ({ type: "turn.committed", data: turn(id) }) as unknown as GatewayEvent;

/** A history whose lists are answered when the test says so. */
function asked() {
  const answers: ((ids: string[]) => void)[] = [];
  const list = () =>
    new Promise((answer) => {
      answers.push((ids) => answer({ turns: ids.map(turn), more: false }));
    });
  const history = new History(() => ({ history: { list } }) as unknown as Tenant);
  return { history, answers, shown: () => history.turns.value.map((one) => one.turn) };
}

test("a turn that ends while the list is loaded stays in it", async () => {
  const { history, answers, shown } = asked();
  const looked = history.look();
  history.take(committed("2"));
  history.take(committed("3"));
  expect(shown()).toEqual(["3", "2"]);
  answers[0]?.(["1"]);
  await looked;
  expect(shown()).toEqual(["3", "2", "1"]);
});

test("a turn that is in the list and told comes once", async () => {
  const { history, answers, shown } = asked();
  const looked = history.look();
  history.take(committed("2"));
  answers[0]?.(["2", "1"]);
  await looked;
  expect(shown()).toEqual(["2", "1"]);
});

test("what a later list no longer has is gone", async () => {
  const { history, answers, shown } = asked();
  const first = history.look();
  answers[0]?.(["1"]);
  await first;
  history.take(committed("2"));
  const second = history.look();
  answers[1]?.(["3"]);
  await second;
  expect(shown()).toEqual(["3"]);
});
