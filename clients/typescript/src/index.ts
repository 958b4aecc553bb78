/** The client of incus-gateway: start at `Gateway`. */

export type { SocketConstructor, SocketLike } from "./connection.js";
export type { TokenSource } from "./credential.js";
export { Disconnected, type ErrorCode, type Facts, GatewayError } from "./errors.js";
export {
  type AttachOptions,
  type Encoding,
  Exec,
  type ExecEvents,
  type ExecOptions,
  type Output,
  type StreamName,
} from "./exec.js";
export type { Files, WriteOptions } from "./files.js";
export {
  Deployment,
  type DeploymentRequest,
  type EventFilter,
  Gateway,
  type GatewayOptions,
} from "./gateway.js";
export type { LinkState, LinkStatus } from "./link.js";
export { Tenant, type TenantEvents, type TenantOptions, type ToolOptions, type Watch } from "./tenant.js";
export type * from "./types.js";
export { unique } from "./unique.js";
