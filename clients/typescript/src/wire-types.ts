// Made by wire_types.py from the gateway's own schema of `gateway.v1`: do not change it by hand.
// biome-ignore-all format: it is as it was made

/** `blob` is base64. */
export type Blob = {
  readonly uri: string;
  readonly mimeType: string;
  readonly blob: string;
};

export type CancelRequest = {
  readonly id: string | number;
};

export type ChangedFile = {
  readonly path: string;
  readonly added: number;
  readonly removed: number;
  readonly binary: boolean;
};

export type ClientInfo = {
  readonly name?: string | undefined;
  readonly version?: string | undefined;
};

/** CloudEvents 1.0. `subject` is the tenant. A `gap` means that events before `data.oldest` are gone. */
export type CloudEvent = {
  readonly specversion: "1.0";
  readonly id: string;
  readonly source: string;
  readonly type: string;
  readonly subject?: string | undefined;
  readonly time: string;
  readonly data: Readonly<Record<string, unknown>>;
};

/** Bytes of each stream since the command's start. */
export type Counts = {
  readonly stdout: number;
  readonly stderr: number;
};

export type Draining = {
  readonly retryAfterMs: number;
};

/** No result, except that the call succeeded. */
export type Empty = Readonly<Record<string, never>>;

/** `mode` has the permission bits, `mtime` is in seconds since the epoch, `target` is a link's target. */
export type Entry = {
  readonly path: string;
  readonly type: "file" | "directory" | "symlink" | "other";
  readonly size: number;
  readonly mode: number;
  readonly mtime: number;
  readonly etag: string;
  readonly target?: string | null | undefined;
  readonly escaped?: boolean | undefined;
};

export type EventsEnded = {
  readonly subscription: number;
  readonly reason: string;
};

export type EventsSubscribe = {
  readonly types?: readonly string[] | null | undefined;
  readonly lastEventId?: number | string | null | undefined;
};

export type EventsUnsubscribe = {
  readonly subscription: number;
};

export type ExecAck = {
  readonly stdout?: number | undefined;
  readonly stderr?: number | undefined;
  readonly exec: string;
};

export type ExecAttach = {
  readonly acks?: boolean | undefined;
  readonly window?: number | null | undefined;
  readonly encoding?: "binary" | "utf-8" | undefined;
  readonly exec: string;
  readonly from?: Offsets | undefined;
  readonly resume?: string | null | undefined;
};

export type ExecAttached = {
  readonly channel: number;
  readonly from: Counts;
  readonly lost: Counts;
  readonly state: "running" | "ended";
  readonly attachment: string;
  readonly stdin: number;
  readonly stdinWindow: number;
};

export type ExecCancel = {
  readonly exec: string;
  readonly graceMs?: number | null | undefined;
};

export type ExecDetached = {
  readonly exec: string;
  readonly channel: number;
  readonly reason: string;
};

/** `exitCode` is null if it is unknown; `left` counts processes of the command that still run. */
export type ExecExited = {
  readonly exec: string;
  readonly exitCode: number | null;
  readonly signal: string | null;
  readonly reason: "exited" | "cancelled" | "timeout" | "lost";
  readonly durationMs: number;
  readonly offsets: Counts;
  readonly left: number | null;
};

/** One command, with the first 4096 characters of `argv`. */
export type ExecInfo = {
  readonly exec: string;
  readonly argv: readonly string[];
  readonly pid: number;
  readonly startedAt: string;
  readonly pty: boolean;
  readonly state: "running" | "ended";
  readonly attached: number;
  readonly offsets: Counts;
  readonly exit?: ExecExited | undefined;
  readonly left?: readonly LeftProcess[] | undefined;
};

/** The number of bytes of this attachment's input that the command has taken. */
export type ExecInput = {
  readonly exec: string;
  readonly channel: number;
  readonly consumed: number;
};

export type ExecList = {
  readonly execs: readonly ExecInfo[];
};

/** The number of bytes that are skipped before the next output. */
export type ExecLost = {
  readonly exec: string;
  readonly channel: number;
  readonly stream: "stdout" | "stderr";
  readonly bytes: number;
};

export type ExecRef = {
  readonly exec: string;
};

export type ExecResize = {
  readonly exec: string;
  readonly cols: number;
  readonly rows: number;
};

export type ExecSignal = {
  readonly exec: string;
  readonly signal: string | number;
  readonly tree?: boolean | undefined;
};

/** Exactly one of `argv`, a program, and `command`, a line for bash. */
export type ExecStart = {
  readonly acks?: boolean | undefined;
  readonly window?: number | null | undefined;
  readonly encoding?: "binary" | "utf-8" | undefined;
  readonly argv?: readonly string[] | null | undefined;
  readonly command?: string | null | undefined;
  readonly cwd?: string | null | undefined;
  readonly env?: Readonly<Record<string, string>> | undefined;
  readonly user?: string | number | null | undefined;
  readonly pty?: PtySize | null | undefined;
  readonly stdin?: boolean | undefined;
  readonly helper?: boolean | undefined;
  readonly timeoutMs?: number | null | undefined;
  readonly lingerMs?: number | null | undefined;
  readonly execId?: string | null | undefined;
};

/** `attachment` identifies this reader; send it as `resume` after a lost connection. */
export type ExecStarted = {
  readonly exec: string;
  readonly channel: number;
  readonly pid: number;
  readonly startedAt: string;
  readonly attachment: string;
  readonly stdinWindow: number;
};

export type FileChange = {
  readonly path: string;
  readonly change: "created" | "changed" | "removed";
};

/** `text`, or else `data` in base64. */
export type FileContent = {
  readonly text?: string | undefined;
  readonly data?: string | undefined;
  readonly etag: string;
  readonly encoding: "utf-8" | "base64";
  readonly size: number;
  readonly mode: number;
};

export type FileWritten = {
  readonly etag: string;
  readonly size: number;
  readonly created: boolean;
};

/** `overflow` means that changes were missed; `ended` says why the watch has ended. */
export type FilesChanged = {
  readonly watch: number;
  readonly changes: readonly FileChange[];
  readonly overflow: boolean;
  readonly ended?: string | undefined;
};

export type FilesList = {
  readonly path?: string | undefined;
  readonly depth?: number | undefined;
};

export type FilesMkdir = {
  readonly path: string;
  readonly createDirs?: boolean | undefined;
};

export type FilesMove = {
  readonly from: string;
  readonly to: string;
  readonly overwrite?: boolean | undefined;
  readonly createDirs?: boolean | undefined;
};

export type FilesPath = {
  readonly path: string;
};

export type FilesRemove = {
  readonly path: string;
  readonly recursive?: boolean | undefined;
  readonly ifMatch?: string | null | undefined;
};

export type FilesUnwatch = {
  readonly watch: number;
};

/** `ignore` has names, ignored at any depth; None selects the gateway's own list. */
export type FilesWatch = {
  readonly paths: readonly string[];
  readonly ignore?: readonly string[] | null | undefined;
};

/** Exactly one of `text`, written as UTF-8, and `data`, in base64. */
export type FilesWrite = {
  readonly path: string;
  readonly text?: string | null | undefined;
  readonly data?: string | null | undefined;
  readonly ifMatch?: string | null | undefined;
  readonly ifNoneMatch?: string | null | undefined;
  readonly createDirs?: boolean | undefined;
};

export type HistoryList = {
  readonly limit?: number | undefined;
  readonly before?: string | null | undefined;
};

/** `to` selects the state: right `after` the turn, or `before` it. */
export type HistoryRestore = {
  readonly turn: string;
  readonly to?: "after" | "before" | undefined;
};

export type HistoryTurn = {
  readonly turn: string;
};

/** An undo of one turn. */
export type HistoryUndo = {
  readonly force?: readonly string[] | undefined;
  readonly turn: string;
};

/** The member of a cluster that has the tenant; `url` is null if it has no address for clients. */
export type Home = {
  readonly member: string;
  readonly url: string | null;
};

/** `data` is base64. */
export type Image = {
  readonly type: "image";
  readonly data: string;
  readonly mimeType: string;
};

export type Initialize = {
  readonly client?: ClientInfo | undefined;
  readonly token?: string | null | undefined;
  readonly session?: string | null | undefined;
  readonly readBeforeWrite?: boolean | undefined;
};

/** What the gateway is, and what the token allows; `expires` is in seconds since the epoch. `home` exists only in a cluster. */
export type Initialized = {
  readonly server: Server;
  readonly protocol: number;
  readonly tenant: string;
  readonly workspace: string;
  readonly user: string;
  readonly scopes: readonly string[];
  readonly expires: number;
  readonly home?: Home | undefined;
  readonly limits: Limits;
};

export type Killed = {
  readonly killed: number;
  readonly escalated: boolean;
  readonly survivors: number;
  readonly method: "cgroup" | "scan";
};

export type LeftProcess = {
  readonly pid: number;
  readonly name: string;
};

/** Limits for clients; `maxFrame`, `execTail` and `maxArgument` are in bytes. */
export type Limits = {
  readonly maxFrame: number;
  readonly maxRequests: number;
  readonly maxExecs: number;
  readonly execTail: number;
  readonly maxArgument: number;
};

/** `truncated` if there are more; `skipped` counts folders that could not be read. */
export type Listing = {
  readonly path: string;
  readonly entries: readonly Entry[];
  readonly truncated: boolean;
  readonly skipped: number;
};

export type NoParams = Readonly<Record<string, never>>;

export type Offsets = {
  readonly stdout?: number | undefined;
  readonly stderr?: number | undefined;
};

export type PtySize = {
  readonly cols?: number | undefined;
  readonly rows?: number | undefined;
};

export type Removed = {
  readonly removed: number;
};

/** What a new token allows on an open connection; `expires` is in seconds since the epoch. */
export type Renewed = {
  readonly expires: number;
  readonly scopes: readonly string[];
};

export type Resource = {
  readonly type: "resource";
  readonly resource: Blob;
};

export type Server = {
  readonly name: string;
  readonly version: string;
};

export type SessionRenew = {
  readonly token: string;
};

/** `position` is `lastEventId` with the member's name in a cluster, by which any of them goes on. */
export type Subscribed = {
  readonly subscription: number;
  readonly lastEventId: number;
  readonly position: string;
};

export type Text = {
  readonly type: "text";
  readonly text: string;
};

export type Tool = {
  readonly name: string;
  readonly description: string;
  readonly inputSchema: Readonly<Record<string, unknown>>;
};

/** `content` is for the model; `structuredContent` has the same facts as data, and a failure's `code`. */
export type ToolResult = {
  readonly content: readonly (Text | Image | Resource)[];
  readonly isError: boolean;
  readonly structuredContent: Readonly<Record<string, unknown>>;
};

export type Tools = {
  readonly tools: readonly Tool[];
};

export type ToolsCall = {
  readonly name: string;
  readonly arguments?: Readonly<Record<string, unknown>> | undefined;
  readonly callId?: string | null | undefined;
  readonly lingerMs?: number | null | undefined;
};

export type ToolsCancel = {
  readonly callId: string;
};

/** One commit of a tenant's history. `title` is the agent's prompt, `at` is in seconds since the epoch. */
export type Turn = {
  readonly turn: string;
  readonly kind: "turn" | "restored" | "outside" | "deployed" | "first";
  readonly agent: string;
  readonly by: string;
  readonly title: string;
  readonly at: number;
  readonly files: number;
  readonly added: number;
  readonly removed: number;
  readonly leftOut: readonly string[];
};

/** `title` is the agent's prompt, `agent` its name, by default the token's subject. */
export type TurnBegin = {
  readonly title?: string | undefined;
  readonly agent?: string | null | undefined;
};

export type TurnBegun = {
  readonly before: Turn | null;
};

/** `diff` is a patch, cut off if `truncated`. */
export type TurnChanges = {
  readonly turn: string;
  readonly kind: "turn" | "restored" | "outside" | "deployed" | "first";
  readonly agent: string;
  readonly by: string;
  readonly title: string;
  readonly at: number;
  readonly files: number;
  readonly added: number;
  readonly removed: number;
  readonly leftOut: readonly string[];
  readonly changed: readonly ChangedFile[];
  readonly diff: string;
  readonly truncated: boolean;
};

export type TurnEnded = {
  readonly turn: Turn | null;
};

export type Turns = {
  readonly turns: readonly Turn[];
  readonly more: boolean;
};

/** `turn` is null if nothing changes; nothing does if there are `conflicts`. */
export type Undone = {
  readonly turn: Turn | null;
  readonly conflicts: readonly string[];
};

/** `unwatched` counts folders that cannot be watched. */
export type Watching = {
  readonly watch: number;
  readonly unwatched: number;
};

/** Parameters and result of each method. */
export interface Methods {
  "initialize": { params: Initialize; result: Initialized };
  "ping": { params: NoParams; result: Empty };
  "tools/list": { params: NoParams; result: Tools };
  "tools/call": { params: ToolsCall; result: ToolResult };
  "tools/cancel": { params: ToolsCancel; result: Empty };
  "session/end": { params: NoParams; result: Empty };
  "session/renew": { params: SessionRenew; result: Renewed };
  "exec/start": { params: ExecStart; result: ExecStarted };
  "exec/attach": { params: ExecAttach; result: ExecAttached };
  "exec/ack": { params: ExecAck; result: Empty };
  "exec/detach": { params: ExecRef; result: Empty };
  "exec/closeStdin": { params: ExecRef; result: Empty };
  "exec/resize": { params: ExecResize; result: Empty };
  "exec/signal": { params: ExecSignal; result: Empty };
  "exec/cancel": { params: ExecCancel; result: Killed };
  "exec/list": { params: NoParams; result: ExecList };
  "exec/wait": { params: ExecRef; result: ExecExited };
  "files/stat": { params: FilesPath; result: Entry };
  "files/list": { params: FilesList; result: Listing };
  "files/read": { params: FilesPath; result: FileContent };
  "files/write": { params: FilesWrite; result: FileWritten };
  "files/move": { params: FilesMove; result: Entry };
  "files/remove": { params: FilesRemove; result: Removed };
  "files/mkdir": { params: FilesMkdir; result: Entry };
  "files/watch": { params: FilesWatch; result: Watching };
  "files/unwatch": { params: FilesUnwatch; result: Empty };
  "turn/begin": { params: TurnBegin; result: TurnBegun };
  "turn/end": { params: NoParams; result: TurnEnded };
  "history/list": { params: HistoryList; result: Turns };
  "history/diff": { params: HistoryTurn; result: TurnChanges };
  "history/restore": { params: HistoryRestore; result: TurnEnded };
  "history/undo": { params: HistoryUndo; result: Undone };
  "events/subscribe": { params: EventsSubscribe; result: Subscribed };
  "events/unsubscribe": { params: EventsUnsubscribe; result: Empty };
}

/** Parameters of what the server says by itself. */
export interface Notifications {
  "exec/exited": ExecExited;
  "exec/stdin": ExecInput;
  "exec/lost": ExecLost;
  "exec/detached": ExecDetached;
  "events/ended": EventsEnded;
  "files/changed": FilesChanged;
  "event": CloudEvent;
  "server/draining": Draining;
}
