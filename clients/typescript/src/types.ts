/** The types of the protocol: those of the websocket, made from the gateway's own schema, and HTTP's answers. */

import type { ErrorCode, Facts } from "./errors.js";
import type { CloudEvent, Counts, Entry, ExecExited, FileWritten, Initialized, Tool } from "./wire-types.js";

export type {
  Entry,
  ExecInfo,
  FileContent,
  Killed,
  Listing,
  Renewed,
  Turn,
  TurnChanges,
  Undone,
} from "./wire-types.js";

export type EntryType = Entry["type"];
export type ExitReason = ExecExited["reason"];
/** One CloudEvent. A `gap` says that events before `data.oldest` are gone: read the state again. */
export type GatewayEvent = CloudEvent;
/** Bytes of each stream since the command began. */
export type Offsets = Counts;
/** What the gateway says of itself, and what the token allows. */
export type ServerInfo = Initialized;
export type ToolInfo = Tool;
export type Written = FileWritten;

export interface Session {
  readonly subject: string;
  readonly scopes: readonly string[];
  /** names, or `["*"]` */
  readonly tenants: readonly string[];
  /** the domains that the token may give to tenants; null if it is not limited */
  readonly domains?: readonly string[] | null;
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
  /** `member_away`: its server does not answer, and this is how it was last known. */
  readonly reason?: "member_away";
  readonly usage?: Usage | null;
  /** In a cluster: its copy on another member, and when the tenant was as that is; null if there is none. */
  readonly standby?: { readonly member: string; readonly of: string } | null;
}

/** A move of a tenant to another server. Times are in seconds since the epoch. */
export interface Move {
  readonly id: string;
  readonly tenant: string;
  readonly from: string;
  readonly to: string;
  readonly state:
    | "waiting"
    | "copying"
    | "switching"
    | "decided"
    | "arrived"
    | "undoing"
    | "moved"
    | "failed";
  readonly began: number;
  readonly ended: number | null;
  /** How long calls waited. */
  readonly gap_ms: number | null;
  readonly error: Facts | null;
  readonly drained: boolean;
}

export interface SiteAnswer {
  /** Whether it answers with less than 500; null if there is no site or it sleeps. */
  readonly answers: boolean | null;
  readonly status: number | null;
  /** `host_refused`: its dev server refuses the name that it is asked by. */
  readonly reason?: "host_refused";
  /** The beginning of what it answered then. */
  readonly said?: string;
}

export interface Listening {
  readonly port: number;
  /** 0.0.0.0 or :: where connections from anywhere are taken. */
  readonly address: string;
}

export interface AgentToken {
  readonly token: string;
  /** The agent's name, as events have it. */
  readonly subject: string;
  readonly scopes: readonly string[];
  /** In seconds since the epoch. */
  readonly expires: number;
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

export type FileChangeKind = "created" | "changed" | "removed";

export interface FileChanges {
  readonly changes: readonly { readonly path: string; readonly change: FileChangeKind }[];
  /** Changes were missed: read again what you show. */
  readonly overflow: boolean;
  readonly ended?: string;
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

/** An entry of the audit log; `time` is in seconds since the epoch. */
export interface AuditEntry {
  readonly id: number;
  /** The member of a cluster that has the entry; its ids are its own. */
  readonly member?: string | undefined;
  readonly time: number;
  readonly who: string;
  readonly action: string;
  readonly tenant: string | null;
  readonly facts: Facts;
}

export interface Size {
  readonly cols: number;
  readonly rows: number;
}

/** How a command ended. `code` is null if its status was lost: `reason` then says `lost`. */
export interface Exit {
  readonly code: number | null;
  readonly signal: string | null;
  readonly reason: ExitReason;
  readonly durationMs: number;
  /** How many processes of its tree still run, null if unknown; `cancel` ends them. */
  readonly left: number | null;
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
  /** What was detected in the folder; `lines` say what was chosen, and why. */
  readonly detected?: Detected | null;
  /** Why it failed, possibly with `phase` and `reason`. */
  readonly error: (Facts & { readonly code: ErrorCode; readonly message: string }) | null;
}

export interface Detected {
  readonly name: string;
  readonly title: string;
  readonly install: string | null;
  readonly start: string | null;
  readonly port: number | null;
  readonly static: string | null;
  readonly lines: readonly string[];
}

/** A tenant's deployments, newest first. */
export interface DeploymentHistory {
  readonly deployments: readonly DeploymentRecord[];
  /** The id of the one that is served; null if unknown. */
  readonly live: string | null;
  /** Those that `Tenant.rollback` can go back to, newest first; `replaced` in seconds since the epoch. */
  readonly kept: readonly { readonly id: string; readonly replaced: number }[];
}
