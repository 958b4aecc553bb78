/** Errors: one class with the protocol's codes, and one for a broken connection. */

export const ERROR_CODES = [
  "unauthorized",
  "forbidden",
  "not_found",
  "conflict",
  "outside_workspace",
  "not_a_file",
  "is_a_directory",
  "too_large",
  "binary_file",
  "ambiguous_match",
  "no_match",
  "stale_read",
  "cancelled",
  "timeout",
  "exec_failed",
  "tenant_not_running",
  "unavailable",
  "rate_limited",
  "gone",
  "invalid_params",
] as const;

/** The protocol's error codes; a newer gateway may have others. */
export type ErrorCode = (typeof ERROR_CODES)[number] | (string & {});

export type Facts = Readonly<Record<string, unknown>>;

/** A refusal by the gateway. `message` is for a person, `facts` are details for a program. */
export class GatewayError extends Error {
  override readonly name: string = "GatewayError";

  constructor(
    readonly code: ErrorCode,
    message: string,
    readonly facts: Facts = {},
  ) {
    super(message);
  }

  /** Whether the same request may succeed later. */
  get retriable(): boolean {
    return this.code === "unavailable" || this.code === "rate_limited" || this.code === "timeout";
  }
}

/** The connection broke. It is unknown whether a request that was under way took effect. */
export class Disconnected extends GatewayError {
  override readonly name = "Disconnected";

  constructor(message: string, code: ErrorCode = "unavailable") {
    super(code, message);
  }
}

/** The request was given up by the caller's `AbortSignal`. */
export function cancelled(): GatewayError {
  return new GatewayError("cancelled", "the request was cancelled");
}

/** The browser's session has ended, or there is none. */
export function signedOut(): GatewayError {
  return new GatewayError("unauthorized", "not signed in, or the session has ended: sign in to continue");
}

const BY_CLOSE: Readonly<Record<number, ErrorCode>> = {
  1009: "too_large",
  4400: "invalid_params",
  4401: "unauthorized",
  4403: "forbidden",
  4404: "not_found",
};

/** Returns the final error that a close code stands for; null if reconnecting may help. */
export function fatalClose(code: number, reason: string): GatewayError | null {
  const word = BY_CLOSE[code];
  return word === undefined
    ? null
    : new GatewayError(word, reason || `the gateway closed the connection (${code})`);
}

const BY_STATUS: Readonly<Record<number, ErrorCode>> = {
  401: "unauthorized",
  403: "forbidden",
  404: "not_found",
  409: "conflict",
  410: "gone",
  412: "conflict",
  413: "too_large",
  429: "rate_limited",
};

// RFC 9457 §3.1, and our own member
const PROBLEM = new Set(["type", "title", "status", "detail", "instance", "code"]);

/** Returns the error of an HTTP answer; `body` is problem+json if it is the gateway's. */
export function refusal(status: number, body: string): GatewayError {
  try {
    const problem = JSON.parse(body) as Record<string, unknown>;
    if (typeof problem.code === "string") {
      const facts = Object.fromEntries(Object.entries(problem).filter(([key]) => !PROBLEM.has(key)));
      return new GatewayError(
        problem.code,
        String(problem.detail ?? problem.title ?? `HTTP ${status}`),
        facts,
      );
    }
  } catch {
    // a proxy's own page
  }
  return new GatewayError(BY_STATUS[status] ?? "unavailable", `HTTP ${status}`);
}
