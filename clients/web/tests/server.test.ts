import type { Tenant } from "@incus-gateway/client";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { Frames, frame } from "../src/editor/servers/framing.js";
import { Server } from "../src/editor/servers/server.js";
import { Documents } from "../src/editor/state/documents.js";
import { Shelf } from "./tenant.js";

interface Command {
  readonly argv: readonly string[];
  end(code: number): void;
  cancelled: boolean;
}

/** A tenant in which commands run; one that `answers` is a server that is ready at once. */
function running(answers: boolean, ends: (argv: readonly string[]) => number | null = () => null) {
  const commands: Command[] = [];
  const exec = async (argv: readonly string[]) => {
    let close = () => {};
    let settle: (exit: object) => void = () => {};
    const exit = new Promise<object>((resolve) => {
      settle = resolve;
    });
    const chunks: Uint8Array[] = [];
    let wake = () => {};
    let over = false;
    close = () => {
      over = true;
      wake();
    };
    const command: Command = {
      argv,
      cancelled: false,
      end: (code) => {
        settle({ code, signal: null, reason: "exited" });
        close();
      },
    };
    commands.push(command);
    const code = ends(argv);
    if (code !== null) command.end(code);
    const frames = new Frames();
    return {
      attached: true,
      get running() {
        return !over;
      },
      exit,
      on: () => {},
      cancel: async () => {
        command.cancelled = true;
        close();
      },
      write: async (data: Uint8Array) => {
        for (const message of frames.push(data)) {
          const { id, method } = JSON.parse(message);
          if (!answers || method !== "initialize") continue;
          chunks.push(frame(JSON.stringify({ jsonrpc: "2.0", id, result: { capabilities: {} } })));
          wake();
        }
      },
      output: async function* () {
        for (;;) {
          for (const data of chunks.splice(0)) yield { stream: "stdout" as const, data };
          if (over) return;
          await new Promise<void>((resolve) => {
            wake = resolve;
          });
        }
      },
    };
  };
  return { commands, tenant: { name: "shop", exec } as unknown as Tenant };
}

function server(tenant: Tenant, kind: "typescript" | "css" = "typescript"): Server {
  const shelf = new Shelf({});
  const documents = new Documents(
    () => shelf.tenant,
    () => false,
  );
  return new Server(kind, () => tenant, documents, "/srv/site");
}

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

test("one that ends by itself is started again three times, then by a person", async () => {
  const { commands, tenant } = running(true);
  const made = server(tenant);
  made.want();
  for (const after of [500, 2000, 5000]) {
    await vi.waitFor(() => expect(made.state.value).toBe("running"));
    commands.at(-1)?.end(1);
    await vi.waitFor(() => expect(made.state.value).toBe("again"));
    await vi.advanceTimersByTimeAsync(after);
  }
  await vi.waitFor(() => expect(made.state.value).toBe("running"));
  commands.at(-1)?.end(1);
  await vi.waitFor(() => expect(made.state.value).toBe("failed"));
  expect(made.failure.value).toContain("It ended with 1");
  made.want();
  await vi.advanceTimersByTimeAsync(600_000);
  expect(commands).toHaveLength(4);
  made.restart();
  await vi.waitFor(() => expect(made.state.value).toBe("running"));
  made.dispose();
});

test("one that nobody uses for five minutes is ended, and starts again when it is wanted", async () => {
  const { commands, tenant } = running(true);
  const made = server(tenant);
  made.want();
  await vi.waitFor(() => expect(made.state.value).toBe("running"));
  await vi.advanceTimersByTimeAsync(200_000);
  made.want();
  await vi.advanceTimersByTimeAsync(200_000);
  expect(made.state.value).toBe("running");
  await vi.advanceTimersByTimeAsync(200_000);
  expect(made.state.value).toBe("resting");
  expect(commands[0]?.cancelled).toBe(true);
  made.want();
  await vi.waitFor(() => expect(made.state.value).toBe("running"));
  expect(commands).toHaveLength(2);
  made.dispose();
  expect(commands[1]?.cancelled).toBe(true);
});

test("one that is missing is installed once, and what cannot be installed is told", async () => {
  const { commands, tenant } = running(true, (argv) => (argv.length === 6 ? 69 : 1));
  const made = server(tenant, "css");
  made.want();
  await vi.waitFor(() => expect(made.state.value).toBe("failed"));
  expect(made.failure.value).toContain("It could not be installed. npm ended with 1.");
  expect(commands).toHaveLength(2);
});
