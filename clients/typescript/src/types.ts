/** The types of the protocol: parameters and results of the methods, and HTTP's answers. */

import type { ErrorCode, Facts } from "./errors.js";

export interface ServerInfo {
  readonly server: { readonly name: string; readonly version: string };
  readonly protocol: number;
  readonly tenant: string;
  readonly workspace: string;
  readonly user: string;
  readonly scopes: readonly string[];
  readonly limits: Readonly<Record<string, number>>;
  /** When the token ends, in seconds since the epoch; absent from older gateways. */
  readonly expires?: number;
}

/** The result of a newer token on an open connection. */
export interface Renewed {
  readonly expires: number;
  readonly scopes: readonly string[];
}

export interface Session {
  readonly subject: string;
  readonly scopes: readonly string[];
  /** names, or `["*"]` */
  readonly tenants: readonly string[];
  /** seconds since the epoch */
  readonly expires: number;
  /** the id for revoking it */
  readonly id?: string;
  readonly slot?: string | null;
}

export type TenantStatus = "running" | "stopped" | "frozen" | "starting" | "stopping" | "error";

export interface TenantInfo {
  readonly name: string;
  readonly domain: string | null;
  readonly status: TenantStatus;
  /** Stopped until it is asked for. */
  readonly asleep?: boolean;
  readonly address: string | null;
  readonly url: string | null;
  readonly port: number | null;
  readonly created: string | null;
  readonly limits: Facts;
  readonly location: string | null;
  readonly usage?: Usage | null;
}

export interface SiteAnswer {
  /** Whether it answers with less than 500; null if there is no site or it sleeps. */
  readonly answers: boolean | null;
  readonly status: number | null;
}

export interface Usage {
  readonly cpu_seconds: number;
  readonly memory_bytes: number;
  readonly memory_peak_bytes: number | null;
  readonly memory_limit_bytes: number | null;
  readonly processes: number;
  readonly disk_bytes: number | null;
  readonly disk_limit_bytes: number | null;
  readonly network: Readonly<
    Record<string, { readonly received_bytes: number; readonly sent_bytes: number }>
  >;
}

export type EntryType = "file" | "directory" | "symlink" | "other";

export interface Entry {
  readonly path: string;
  readonly type: EntryType;
  readonly size: number;
  readonly mode: number;
  readonly mtime: number;
  readonly etag: string;
  readonly target?: string | null;
  readonly escaped?: boolean;
}

export interface Listing {
  readonly path: string;
  readonly entries: readonly Entry[];
  readonly truncated: boolean;
  readonly skipped: readonly string[];
}

export interface FileContent {
  readonly text?: string;
  /** base64 */
  readonly data?: string;
  readonly etag: string;
  readonly encoding: "utf-8" | "base64";
  readonly size: number;
  readonly mode: number;
}

export interface Written {
  readonly etag: string;
  readonly size: number;
  readonly created: boolean;
}

export type FileChangeKind = "created" | "changed" | "removed";

export interface FileChanges {
  readonly changes: readonly { readonly path: string; readonly change: FileChangeKind }[];
  /** Changes were missed: read again what you show. */
  readonly overflow: boolean;
  readonly ended?: string;
}

export interface ToolInfo {
  readonly name: string;
  readonly description: string;
  readonly inputSchema: Readonly<Record<string, unknown>>;
}

/** The result of a command over HTTP. */
export interface RunResult {
  readonly exec: string;
  readonly exitCode: number | null;
  readonly signal: string | null;
  readonly reason: "exited" | "timeout" | "cancelled";
  readonly stdout: string;
  readonly stderr: string;
  /** The output was cut. */
  readonly truncated: boolean;
  readonly durationMs: number;
  readonly left: number | null;
}

/** A snapshot of a tenant's disk; `size` is what it alone takes, in bytes, null if unknown. */
export interface SnapshotInfo {
  readonly name: string;
  readonly created: string | null;
  readonly size: number | null;
}

export type TenantSize = "small" | "medium" | "large";

/** An entry of the audit log. */
export interface AuditEntry {
  readonly id: number;
  readonly time: string;
  readonly who: string;
  readonly action: string;
  readonly tenant: string | null;
  readonly facts: Facts;
}

export interface Size {
  readonly cols: number;
  readonly rows: number;
}

export interface Offsets {
  readonly stdout: number;
  readonly stderr: number;
}

export type ExitReason = "exited" | "cancelled" | "timeout" | "lost";

/** How a command ended. `code` is null if its status was lost: `reason` then says `lost`. */
export interface Exit {
  readonly code: number | null;
  readonly signal: string | null;
  readonly reason: ExitReason;
  readonly durationMs: number;
  /** How many processes of its tree still run, null if unknown; `cancel` ends them. */
  readonly left: number | null;
}

export interface Killed {
  readonly killed: number;
  readonly escalated: boolean;
  readonly survivors: number;
}

export interface ExecInfo {
  readonly exec: string;
  readonly argv: readonly string[];
  readonly pid: number;
  readonly startedAt: string;
  readonly pty: boolean | Size | null;
  readonly state: "running" | "ended";
  readonly attached: number;
  readonly offsets: Offsets;
  /** How many processes of an ended command still run. */
  readonly left?: readonly { readonly pid: number; readonly name: string }[];
}

/** One commit of a tenant's history. */
export interface Turn {
  readonly turn: string;
  readonly kind: "turn" | "restored" | "outside" | "deployed" | "first";
  readonly agent: string;
  /** The subject of the token. */
  readonly by: string;
  /** The request to the agent. */
  readonly title: string;
  /** In seconds since the epoch. */
  readonly at: number;
  readonly files: number;
  readonly added: number;
  readonly removed: number;
  /** The first of the paths that are too large, or not regular files. */
  readonly leftOut: readonly string[];
}

export interface TurnChanges extends Turn {
  readonly changed: readonly {
    readonly path: string;
    readonly added: number;
    readonly removed: number;
    readonly binary: boolean;
  }[];
  /** A patch, cut if `truncated`. */
  readonly diff: string;
  readonly truncated: boolean;
}

/** One CloudEvent. A `gap` says that events before `data.oldest` are lost: read the state again. */
export interface GatewayEvent {
  readonly id: string;
  readonly type: string;
  readonly subject?: string;
  readonly source: string;
  readonly time: string;
  readonly data: Readonly<Record<string, unknown>>;
}

export interface TemplateInfo {
  readonly name: string;
  readonly description: string;
  readonly port?: number;
  readonly error?: string;
}

export interface DeploymentPhase {
  readonly name: string;
  readonly state: "waiting" | "running" | "done" | "failed" | "undone";
  readonly ms: number | null;
}

export type DeploymentState = "waiting" | "running" | "succeeded" | "undoing" | "rolledback";

/** The answer to the request of a deployment. */
export interface DeploymentStarted {
  readonly id: string;
  readonly tenant: string;
  readonly state: DeploymentState;
}

/** A deployment's current state. */
export interface DeploymentRecord extends DeploymentStarted {
  readonly domain: string;
  readonly url: string;
  readonly template: string;
  readonly kind: "create" | "update";
  readonly port: number;
  readonly source: string | null;
  /** In seconds since the epoch. */
  readonly created: number;
  readonly ended: number | null;
  readonly ms: number | null;
  /** For a rollback, the id of the deployment to go back to. */
  readonly rollback?: string | null;
  /** The names of the changed variables. */
  readonly env?: readonly string[] | null;
  readonly warnings: readonly string[];
  readonly phases: readonly DeploymentPhase[];
  /** Why it failed, possibly with `phase` and `reason`. */
  readonly error: (Facts & { readonly code: ErrorCode; readonly message: string }) | null;
}

/** A tenant's deployments, newest first. */
export interface DeploymentHistory {
  readonly deployments: readonly DeploymentRecord[];
  /** The id of the one that is served; null if unknown. */
  readonly live: string | null;
  /** Those that `Tenant.rollback` can go back to, newest first; `replaced` in seconds since the epoch. */
  readonly kept: readonly { readonly id: string; readonly replaced: number }[];
}
