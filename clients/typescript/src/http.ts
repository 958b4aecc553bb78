/** HTTP requests to a gateway, with the current token or the browser's cookie. */

import { unreachable } from "./browser.js";
import type { Credential } from "./credential.js";
import { Disconnected, GatewayError, refusal, signedOut } from "./errors.js";

export interface HttpOptions {
  readonly body?: RequestInit["body"] | undefined;
  readonly headers?: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal | undefined;
}

/** Node says only "fetch failed"; the reason is in the cause or, for a name with several addresses, in its causes. */
function reason(error: unknown): string {
  const cause = error instanceof Error ? error.cause : undefined;
  const first = cause instanceof AggregateError ? (cause.errors[0] as unknown) : cause;
  const words = [first, cause, error].find((one) => one instanceof Error && one.message !== "");
  return words instanceof Error ? words.message : String(error);
}

export class HttpClient {
  readonly url: string;
  /** @internal */
  readonly credential: Credential;
  /** The browser's session to use; null for the unnamed one. */
  slot: string | null;
  readonly #fetch: typeof fetch;
  #answered = false;

  constructor(url: string, credential: Credential, slot: string | null, fetching?: typeof fetch) {
    this.url = url;
    this.credential = credential;
    this.slot = slot;
    this.#fetch = fetching ?? ((...args) => fetch(...args));
  }

  /** Sends a request and returns its answer. Throws the error of a refusal, `Disconnected` without an answer. */
  async http(method: string, path: string, options: HttpOptions = {}): Promise<Response> {
    const token = await this.credential.current();
    let response = await this.#send(method, path, options, token);
    // a stream is used up; all else can be sent again, since a refused request had no effect
    if (
      response.status === 401 &&
      this.credential.renewable &&
      !(options.body instanceof ReadableStream) &&
      !options.signal?.aborted
    ) {
      await response.body?.cancel();
      response = await this.#send(method, path, options, await this.credential.renewed(token));
    }
    if (!response.ok) {
      const error = refusal(response.status, await response.text().catch(() => ""));
      const nobody = error.code === "unauthorized" && this.credential.absent && path !== "/v1/session";
      throw nobody ? signedOut() : error;
    }
    return response;
  }

  async #send(method: string, path: string, options: HttpOptions, token: string | null): Promise<Response> {
    const headers: Record<string, string> = { ...options.headers };
    if (token !== null) headers.Authorization = `Bearer ${token}`;
    if (this.slot !== null) headers["X-Session-Slot"] = this.slot;
    try {
      const response = await this.#fetch(this.url + path, {
        method,
        headers,
        // Cloudflare's runtime has no cache to pass by, and of before November 2024 refuses to be told
        ...("cache" in Request.prototype ? { cache: "no-store" } : {}),
        ...(options.body === undefined ? {} : { body: options.body }),
        // Node requires it for a stream
        ...(options.body instanceof ReadableStream ? { duplex: "half" } : {}),
        ...(options.signal === undefined ? {} : { signal: options.signal }),
      });
      this.#answered = true;
      return response;
    } catch (error) {
      if (options.signal?.aborted) throw new GatewayError("cancelled", "the request was cancelled");
      if (this.#answered) throw new Disconnected(`no gateway answers at ${this.url}: ${reason(error)}`);
      throw await unreachable(this.url, reason(error));
    }
  }

  /** Sends JSON and returns the JSON of the answer, null if it has none. */
  async json<Result>(
    method: string,
    path: string,
    value?: unknown,
    options: HttpOptions = {},
  ): Promise<Result> {
    const body = value === undefined ? undefined : JSON.stringify(value);
    const headers = {
      ...options.headers,
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
    };
    const response = await this.http(method, path, { ...options, headers, body });
    return (response.status === 204 ? null : await response.json()) as Result;
  }
}
