import { type ExecInfo, GatewayError, type GatewayEvent, type Tenant } from "@incus-gateway/client";
import { expect, test, vi } from "vitest";
import { control, Terminals } from "../src/editor/state/terminals.js";
import { Screen } from "../src/editor/terminal/screen.js";

test.each([
  ["c", "\x03"],
  ["D", "\x04"],
  ["[", "\x1b"],
  ["5", "5"],
])("Ctrl makes of %j what a terminal expects", (letter, sent) => {
  expect(control(letter)).toBe(sent);
});

test("the key Ctrl is for one letter, and all that is typed arrives in its order", async () => {
  const sent: unknown[] = [];
  const { state, tenant } = away((data) => sent.push(data));
  state.up = true;
  const terminals = new Terminals(() => tenant, "typed");
  const terminal = terminals.open(true);
  void terminals.run(terminal, screen);
  await vi.waitFor(() => expect(terminal.state.value).toBe("running"));
  terminals.ctrl.value = true;
  for (const letter of "cecho") terminals.input(terminal, letter); // without a pause, as by one's thumbs
  expect(terminals.ctrl.value).toBe(false);
  expect(sent.splice(0)).toEqual(["\x03", "e", "c", "h", "o"]);
  terminals.ctrl.value = true;
  for (const keys of ["\x1b[A", "ce", "cho"]) terminals.input(terminal, keys); // as a phone's keyboard gives them
  expect(sent).toEqual(["\x1b[A", "\x03e", "cho"]);
});

test("terminals are gone through in a circle", () => {
  const terminals = new Terminals(() => away().tenant, "none");
  expect(terminals.step(1)).toBeNull();
  const [first, second, third] = [1, 2, 3].map(() => terminals.open(true));
  expect([1, 1, -1, -1].map((by) => terminals.step(by))).toEqual([first, second, first, third]);
});

/** A tenant that is away until `up`. */
function away(write: (data: unknown) => void = () => {}) {
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
        stdout: { offset: 0 },
        write: async (data: unknown) => write(data),
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

/** A tenant with one shell that printed `before` bytes while another page was open, and then prints `chunks` here. */
function reloaded(
  before: number,
  chunks: Iterable<string> | AsyncIterable<string>,
  sent: unknown[],
  attached = 0,
) {
  const forever = new Promise<never>(() => {});
  const stdout = { taken: 0 };
  async function* output() {
    for await (const chunk of chunks) {
      const data = new TextEncoder().encode(chunk);
      stdout.taken += data.length;
      yield { stream: "stdout", data };
    }
    await forever;
  }
  const exec = {
    on: () => {},
    output,
    exit: forever,
    stdout,
    resize: async () => {},
    write: async (data: unknown) => sent.push(data),
  };
  const known = { exec: "terminal-1", state: "running", attached, offsets: { stdout: before, stderr: 0 } };
  return {
    execs: async () => [known as ExecInfo],
    attach: async () => exec,
  } as unknown as Tenant;
}

test("what was answered before a reload is not answered again, to the byte; typed letters arrive", async () => {
  const asks = "\x1b[c\x1b[>c\x1b[5n\x1b[6n\x1b[?1$p\x1bP$qm\x1b\\"; // vim asks such things, and more
  const before = `prompt$ ${asks}`;
  const sent: unknown[] = [];
  // all of it in one frame, as it comes: the recorded part ends in the middle
  const tenant = reloaded(before.length, [`${before}\x1b[5n`, "\x1b[0c"], sent);
  sessionStorage.setItem("gateway.terminals.again", JSON.stringify([{ id: "terminal-1", title: "bash" }]));
  const terminals = new Terminals(() => tenant, "again");
  const terminal = terminals.active.value!;
  const real = new Screen(false, false);
  real.onInput = (data) => terminals.input(terminal, data);
  const write = vi.spyOn(real, "write");
  write.mockImplementationOnce((data) => {
    terminals.input(terminal, "x");
    return real.write(data);
  });
  void terminals.run(terminal, real);
  await vi.waitFor(() => expect(sent).toContain("\x1b[?1;2c"));
  expect(sent).toEqual(["x", "\x1b[0n", "\x1b[?1;2c"]);
  real.dispose();
});

/** One of the windows on the same shell: the earliest, or one that is `late`. */
function windowOn(late: boolean) {
  const sent: string[] = [];
  let print = (_text: string) => {};
  async function* printed() {
    for (;;)
      yield await new Promise<string>((resolve) => {
        print = resolve;
      });
  }
  const tenant = reloaded(0, printed(), sent, late ? 1 : 0);
  const terminals = new Terminals(() => tenant, "windows");
  const terminal = terminals.watch("terminal-1", "bash", false);
  const shown = new Screen(false, false);
  shown.onInput = (data) => terminals.input(terminal, data);
  shown.onFocus = () => terminals.claim(terminal);
  void terminals.run(terminal, shown);
  return { sent, shown, terminals, print: (text: string) => print(text) };
}

test("of two windows on one terminal one answers a program: the first, then that which has the focus", async () => {
  const windows = [windowOn(false), windowOn(true)] as const;
  const [first, second] = windows;
  /** Has the program ask both, and returns which of them answered. */
  const asked = async () => {
    for (const { print } of windows) print("\x1b[6n\x1b[c\x1b[5nasked");
    for (const { shown } of windows) {
      await vi.waitFor(() => expect(shown.text).toContain("asked"));
      await shown.write(new TextEncoder().encode("\x1b[2J\x1b[H"));
    }
    return windows.map(({ sent }) => sent.splice(0).length);
  };
  const other = (one: typeof first) =>
    vi.waitFor(() => expect(one.terminals.active.value!.answers).toBe(false));
  try {
    await vi.waitFor(() => expect(second.terminals.active.value!.state.value).toBe("running"));
    expect(await asked()).toEqual([3, 0]);
    second.shown.element.dispatchEvent(new FocusEvent("focusin"));
    await other(first);
    expect(await asked()).toEqual([0, 3]);
    first.shown.element.dispatchEvent(new FocusEvent("focusin"));
    await other(second);
    expect(await asked()).toEqual([3, 0]);
    first.terminals.input(first.terminals.active.value!, "x");
    second.terminals.input(second.terminals.active.value!, "y");
    expect(windows.map(({ sent }) => sent)).toEqual([["x"], ["y"]]);
  } finally {
    for (const { terminals } of windows) terminals.dispose();
    sessionStorage.removeItem("gateway.terminals.windows");
  }
});
