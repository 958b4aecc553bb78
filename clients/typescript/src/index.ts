/** The client of incus-gateway: start at `Gateway`. */

/// <reference lib="esnext.disposable" preserve="true" />

export type { SocketConstructor, SocketLike } from "./connection.js";
export type { TokenSource } from "./credential.js";
export { Deployment, type DeploymentRequest } from "./deployment.js";
export { Disconnected, type ErrorCode, type Facts, GatewayError } from "./errors.js";
export { Exec, type ExecEvents } from "./exec.js";
export type { AttachOptions, Encoding, ExecOptions } from "./exec-options.js";
export type { TenantEvents, Watch } from "./feed.js";
export type { Files, UploadBody, UploadOptions, WriteOptions } from "./files.js";
export { type EventFilter, Gateway, type GatewayOptions } from "./gateway.js";
export type { History } from "./history.js";
export type { BeginOptions, Logs } from "./lifecycle.js";
export type { LinkState, LinkStatus, RequestOptions } from "./link.js";
export type { Output, StreamName } from "./output.js";
export {
  type RunOptions,
  Tenant,
  type TenantEventOptions,
  type TenantOptions,
  type WatchOptions,
} from "./tenant.js";
export {
  type BashOptions,
  type GrepOptions,
  type ReadOptions,
  ShellResult,
  type ToolContent,
  type ToolOptions,
  ToolResult,
} from "./tools.js";
export type * from "./types.js";
export { unique } from "./unique.js";
