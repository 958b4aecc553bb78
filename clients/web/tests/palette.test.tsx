import { signal } from "@preact/signals";
import { render } from "preact";
import { act } from "preact/test-utils";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { palette } from "../src/editor/state/commands.js";
import type { Workspace } from "../src/editor/state/workspace.js";
import { Palette } from "../src/editor/ui/palette.js";

let host: HTMLElement;
const shown: unknown[] = [];
/** The answer to what is searched for next. */
let answer: (paths: readonly string[]) => void;
const status = signal({ state: "open" });
const one = { path: "src/one.ts" };

function open(initial: string): void {
  palette.value = { mode: "files", initial };
  const current = {
    status,
    files: { find: () => new Promise((resolve) => (answer = resolve)) },
    documents: {
      show: async (...given: unknown[]) => shown.push(given),
      tabs: { open: signal([{ path: "src/first.ts" }, one]), current: signal(one) },
    },
  } as unknown as Workspace;
  act(() => render(<Palette current={current} />, host));
}

const field = () => host.querySelector("input")!;
const text = () => host.querySelector(".choices")!.textContent;

async function type(query: string): Promise<void> {
  await act(() => {
    field().value = query;
    field().dispatchEvent(new InputEvent("input", { bubbles: true }));
  });
}

async function enter(): Promise<void> {
  await act(() => void field().dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true })));
}

beforeEach(() => {
  vi.useFakeTimers();
  shown.length = 0;
  status.value = { state: "open" };
  host = document.body.appendChild(document.createElement("div"));
});

afterEach(() => {
  render(null, host);
  host.remove();
  palette.value = null;
  vi.useRealTimers();
});

test("a line alone is one of the file that is shown", async () => {
  open(":");
  expect(text()).toBe("Type a line number.");
  await type(":120");
  expect(text()).toBe("Go to line 120one.ts");
  await enter();
  expect(shown).toEqual([["src/one.ts", { line: 120 }]]);
});

test("Enter waits for the files that are searched, and is not of another name", async () => {
  open("");
  await type("one");
  await vi.advanceTimersByTimeAsync(60);
  await act(async () => answer(["src/one.ts"]));
  expect(text()).toContain("one.ts");
  await type("two:7");
  await enter();
  await vi.advanceTimersByTimeAsync(60);
  expect(shown).toEqual([]);
  await act(async () => answer(["src/two.ts"]));
  expect(shown).toEqual([["src/two.ts", { line: 7 }]]);
});

test("an Enter before another letter opens nothing", async () => {
  open("");
  await type("t");
  await enter();
  await type("tw");
  await vi.advanceTimersByTimeAsync(60);
  await act(async () => answer(["src/two.ts"]));
  expect(shown).toEqual([]);
});

test("what is not found is said to be so, and what cannot be searched now, too", async () => {
  open("");
  await type(">no such command");
  expect(text()).toBe("No command has that name.");
  await type("nothing");
  expect(text()).toBe("Searching…");
  await act(() => {
    status.value = { state: "reconnecting" };
  });
  expect(text()).toContain("once the gateway can be reached");
  await vi.advanceTimersByTimeAsync(60);
  await act(async () => answer([]));
  expect(text()).toBe("No file has that name.");
});
