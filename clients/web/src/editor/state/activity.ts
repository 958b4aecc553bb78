/** The tenant's activity as events report it: tool calls, commands, files, lifecycle. */

import type { GatewayEvent } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { LANGUAGE_SERVER } from "../servers/served.js";
import type { IconName } from "../ui/icons.js";
import { basename, relative } from "./paths.js";
import { OWN } from "./search.js";
import { TERMINAL } from "./terminals.js";

export interface Item {
  readonly key: string;
  readonly at: number;
  readonly icon: IconName;
  readonly verb: string;
  readonly what: string;
  readonly by: string;
  readonly state: "running" | "done" | "failed" | "told";
  readonly ms: number | null;
  readonly code: string | null;
  /** The command whose output can be looked at. */
  readonly exec: string | null;
  readonly path: string | null;
  readonly writes: boolean;
  /** It was a tool call, which no person makes. */
  readonly tool: boolean;
  /** How often in a row it happened; only the last time is shown. */
  readonly times: number;
}

const KEPT = 600;

const ICONS: Readonly<Record<string, IconName>> = {
  Read: "eye",
  Write: "file-pen",
  Edit: "pencil",
  Glob: "file-search",
  Grep: "scan-search",
  Bash: "square-terminal",
  BashOutput: "scroll-text",
  KillShell: "octagon-x",
};

/** What others do to a tenant past the gateway, in words instead of Incus's own. */
const OUTSIDE: Readonly<Record<string, string>> = {
  "incus.instance-exec": "outside command",
  "incus.instance-console": "a console",
  "incus.instance-file-retrieved": "a file was read",
  "incus.instance-file-pushed": "a file was written",
  "incus.instance-updated": "settings were changed",
};

function alike(one: Item, other: Item): boolean {
  return one.verb === other.verb && one.what === other.what && one.by === other.by;
}

export class Activity {
  readonly items = signal<readonly Item[]>([]);
  /** Show each file that a tool writes. */
  readonly follow = signal(false);
  readonly running = signal(0);
  onWritten: (path: string) => void = () => {};
  #keys = 0;

  constructor(readonly workspace: () => string) {}

  take(event: GatewayEvent): void {
    const { data } = event;
    const at = Date.parse(event.time) || Date.now();
    const by = String(data.by ?? "");
    const plain = {
      key: `${event.id}`,
      at,
      by,
      ms: null,
      code: null,
      exec: null,
      path: null,
      writes: false,
      tool: false,
      times: 1,
    };
    switch (event.type) {
      case "gap":
        // before the first one it only says that there is no more to be had of earlier times
        if (this.items.value.length > 0)
          this.#put({ ...plain, icon: "info", verb: "Gap", what: "some events were missed", state: "told" });
        return;
      case "tool.started": {
        if (String(data.callId ?? "").startsWith(OWN)) return;
        const input = (data.input ?? {}) as Record<string, string>;
        const name = String(data.name);
        const path = input.file_path === undefined ? null : relative(input.file_path, this.workspace());
        this.#put({
          ...plain,
          key: String(data.call ?? event.id),
          icon: ICONS[name] ?? "zap",
          verb: name,
          what: input.command ?? path ?? input.pattern ?? input.bash_id ?? input.shell_id ?? "",
          state: "running",
          exec: (data.exec as string | undefined) ?? null,
          path: name === "Bash" ? null : path,
          tool: true,
          writes: name === "Write" || name === "Edit",
        });
        return;
      }
      case "tool.finished": {
        const done = this.#change(String(data.call), {
          state: data.isError ? "failed" : "done",
          ms: Number(data.ms),
          code: (data.code as string | null) ?? null,
        });
        if (done?.writes && done.state === "done" && done.path !== null && this.follow.value) {
          if (Date.now() - at < 10_000) this.onWritten(done.path);
        }
        return;
      }
      case "exec.started":
        if (String(data.exec).startsWith(TERMINAL) || String(data.exec).startsWith(LANGUAGE_SERVER)) return;
        // a Bash tool's command is shown as the tool call that it belongs to
        if (this.items.value.some(({ exec }) => exec === data.exec)) return;
        this.#put({
          ...plain,
          key: String(data.exec),
          icon: "square-terminal",
          verb: "Run",
          what: String(data.command ?? ""),
          state: "running",
          exec: String(data.exec),
        });
        return;
      case "exec.exited":
        this.#change(String(data.exec), {
          state: data.exitCode === 0 || data.reason === "cancelled" ? "done" : "failed",
          ms: Number(data.durationMs),
          code:
            data.reason === "exited"
              ? data.exitCode === 0
                ? null
                : `exit ${data.exitCode}`
              : String(data.reason),
        });
        return;
      case "file.written": {
        const path = relative(String(data.path), this.workspace());
        if (path === null) return;
        const recent = this.items.value.find((item) => item.path === path && item.by === by && item.writes);
        if (recent !== undefined && at - recent.at < 5000) return;
        this.#put({ ...plain, icon: "save", verb: "Save", what: path, state: "told", path });
        return;
      }
      case "turn.committed":
        this.#put({
          ...plain,
          by: String(data.agent ?? ""),
          icon: "undo",
          verb: "Turn",
          what: String(data.title ?? "").split("\n")[0] ?? "",
          state: "told",
        });
        return;
      case "exec.cancelled":
      case "deployment.phase.progress":
      case "deployment.phase.log":
      case "deployment.phase.started":
      case "deployment.phase.finished":
        return; // the deploy panel shows phases
    }
    const [subject = "", ...rest] = event.type.split(".");
    const kinds: Readonly<Record<string, IconName>> = {
      tenant: "server",
      deployment: "rocket",
      gateway: "radio",
      incus: "hard-drive",
    };
    const failed = /failed|oom|error|unhealthy|pressure(?!\.ended)/.test(event.type);
    const did = OUTSIDE[event.type] ?? rest.join(" ");
    this.#put({
      ...plain,
      icon: kinds[subject] ?? "info",
      verb: subject === "" ? event.type : subject[0]!.toUpperCase() + subject.slice(1),
      what: [did, data.phase, data.domain, data.why, data.advice].filter(Boolean).join(" · "),
      state: failed ? "failed" : "told",
    });
  }

  clear(): void {
    this.items.value = [];
  }

  #put(item: Item): void {
    const [last, ...older] = this.items.value;
    if (item.state === "told" && last?.state === "told" && alike(item, last)) {
      this.items.value = [{ ...last, at: item.at, times: last.times + 1 }, ...older];
      return;
    }
    const key = this.items.value.some(({ key }) => key === item.key)
      ? `${item.key}/${++this.#keys}`
      : item.key;
    this.items.value = [{ ...item, key }, ...this.items.value].slice(0, KEPT);
    this.#count();
  }

  #change(key: string, change: Partial<Item>): Item | null {
    const items = [...this.items.value];
    const at = items.findIndex((item) => item.key === key);
    const found = items[at];
    if (found === undefined) return null;
    items[at] = { ...found, ...change };
    this.items.value = items;
    this.#count();
    return items[at] ?? null;
  }

  #count(): void {
    this.running.value = this.items.value.filter(({ state }) => state === "running").length;
  }
}

export function label({ what, path }: Item): string {
  return path === null ? what : basename(path);
}
