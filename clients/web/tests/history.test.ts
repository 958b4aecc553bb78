import type { GatewayEvent, Tenant, Turn } from "@incus-gateway/client";
import { expect, test } from "vitest";
import { History } from "../src/editor/state/history.js";
import { toasts } from "../src/editor/state/toasts.js";

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

test("an undo says how many files it restored, and takes back itself", async () => {
  const asked: unknown[] = [];
  const undo = async (turn: string, { force }: { force: readonly string[] }) => {
    asked.push([turn, force]);
    return { turn: { turn: "9", title: `Undo: ${turn}`, files: 3 }, conflicts: [] };
  };
  const list = async () => ({ turns: [], more: false });
  const history = new History(() => ({ history: { list, undo } }) as unknown as Tenant);
  await history.undo("1");
  const toast = toasts.value.at(-1);
  expect([toast?.text, toast?.action?.label]).toEqual(["Undone. 3 files restored.", "Redo"]);
  toast?.action?.run();
  expect(asked).toEqual([
    ["1", []],
    ["9", []],
  ]);
});

test("an undo that conflicts changes nothing, and asks for the paths", async () => {
  const asked: unknown[] = [];
  const undo = async (_: string, { force }: { force: readonly string[] }) => {
    asked.push(force);
    return force.length > 0
      ? { turn: { turn: "9", title: "Undo: x", files: 1 }, conflicts: [] }
      : { turn: null, conflicts: ["a", "b"] };
  };
  const list = async () => ({ turns: [], more: false });
  const history = new History(() => ({ history: { list, undo } }) as unknown as Tenant);
  const before = toasts.value.length;
  await history.undo("1");
  expect([history.conflict.value, toasts.value.length]).toEqual([{ turn: "1", paths: ["a", "b"] }, before]);
  await history.undo("1", ["a", "b"]);
  expect([history.conflict.value, asked]).toEqual([null, [[], ["a", "b"]]]);
  expect(toasts.value.at(-1)?.text).toBe("Undone. 1 file restored.");
});
