import { signal } from "@preact/signals";
import { expect, test, vi } from "vitest";
import { once } from "../src/editor/state/idle.js";

test("what waits for something to be so goes on when it is, and not a second time", async () => {
  const there = signal(false);
  const looks = vi.fn(() => there.value);
  const then = vi.fn();
  const waiting = once(looks).then(then);
  await Promise.resolve();
  expect(then).not.toHaveBeenCalled();
  there.value = true;
  await waiting;
  const count = looks.mock.calls.length;
  there.value = false;
  there.value = true;
  expect(looks).toHaveBeenCalledTimes(count);
});

test("what is so already is not waited for", async () => {
  await once(() => true);
});

test("what never is so is not waited for without end", async () => {
  vi.useFakeTimers();
  const waiting = once(() => false, 500);
  await vi.advanceTimersByTimeAsync(500);
  await waiting;
  vi.useRealTimers();
});
