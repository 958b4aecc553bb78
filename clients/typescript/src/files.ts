/** A tenant's files for an editor. Paths are absolute, or relative to the workspace. */

import { base64 } from "./base64.js";
import { Disconnected, GatewayError } from "./errors.js";
import type { HttpClient } from "./http.js";
import type { Link } from "./link.js";
import type { Entry, FileContent, Listing, Written } from "./types.js";

export interface WriteOptions {
  /** Refuse with `conflict` if the file is no longer in this state; the facts have its current `etag`. */
  readonly ifMatch?: string | undefined;
  /** `"*"`: refuse with `conflict` if it exists. */
  readonly ifNoneMatch?: "*" | undefined;
  readonly createDirs?: boolean | undefined;
  readonly signal?: AbortSignal | undefined;
}

export interface UploadOptions {
  readonly ifMatch?: string | undefined;
  /** `"*"`: refuse with `conflict` where there is one. */
  readonly ifNoneMatch?: "*" | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** What can be uploaded. A stream is sent at its own pace, and only once. */
export type UploadBody = string | Uint8Array | Blob | ReadableStream<Uint8Array>;

export class Files {
  readonly #link: Link;
  readonly #http: HttpClient;
  readonly #tenant: string;

  /** @internal */
  constructor(link: Link, http: HttpClient, tenant: string) {
    this.#link = link;
    this.#http = http;
    this.#tenant = tenant;
  }

  stat(path: string, signal?: AbortSignal): Promise<Entry> {
    return this.#link.request("files/stat", { path }, { signal });
  }

  list(path = ".", depth = 1, signal?: AbortSignal): Promise<Listing> {
    return this.#link.request("files/list", { path, depth }, { signal });
  }

  read(path: string, signal?: AbortSignal): Promise<FileContent> {
    return this.#link.request("files/read", { path }, { signal });
  }

  /**
   * Writes a whole file of up to 8 MiB. If the connection breaks before the answer, the request is repeated, and a
   * `conflict` with our own first write is none.
   */
  async write(path: string, content: string | Uint8Array, options: WriteOptions = {}): Promise<Written> {
    const { signal, ...conditions } = options;
    const body = typeof content === "string" ? { text: content } : { data: base64(content) };
    let broken = false;
    for (;;) {
      try {
        return await this.#link.request<Written>("files/write", { path, ...body, ...conditions }, { signal });
      } catch (error) {
        if (error instanceof Disconnected && this.#link.status.state !== "closed" && !broken) {
          broken = true;
          continue;
        }
        if (!broken || !(error instanceof GatewayError) || error.code !== "conflict") throw error;
        const present = await this.read(path, signal);
        const same =
          typeof content === "string" ? present.text === content : encoded(present) === base64(content);
        if (!same) throw error;
        return { etag: present.etag, size: present.size, created: options.ifNoneMatch === "*" };
      }
    }
  }

  move(
    from: string,
    to: string,
    options: {
      readonly overwrite?: boolean | undefined;
      readonly createDirs?: boolean | undefined;
      readonly signal?: AbortSignal | undefined;
    } = {},
  ): Promise<Entry> {
    const { signal, ...wishes } = options;
    return this.#link.request("files/move", { from, to, ...wishes }, { signal });
  }

  remove(
    path: string,
    options: {
      readonly recursive?: boolean | undefined;
      readonly ifMatch?: string | undefined;
      readonly signal?: AbortSignal | undefined;
    } = {},
  ): Promise<{ removed: number }> {
    const { signal, ...wishes } = options;
    return this.#link.request("files/remove", { path, ...wishes }, { signal });
  }

  /** Creates a folder, and those above it. */
  mkdir(path: string, createDirs?: boolean, signal?: AbortSignal): Promise<Entry> {
    return this.#link.request("files/mkdir", { path, createDirs }, { signal });
  }

  /** Uploads a file of any size, atomically. `path` is relative to the workspace. */
  async upload(path: string, body: UploadBody, options: UploadOptions = {}): Promise<Written> {
    const headers: Record<string, string> = {};
    if (options.ifMatch !== undefined) headers["If-Match"] = `"${options.ifMatch}"`;
    if (options.ifNoneMatch !== undefined) headers["If-None-Match"] = options.ifNoneMatch;
    const sent = { body: body as NonNullable<RequestInit["body"]>, headers, signal: options.signal };
    return (await (await this.#http.http("PUT", this.#path(path), sent)).json()) as Written;
  }

  /** Returns a file's bytes from `start` on, at the reader's pace. `path` is relative to the workspace. */
  async download(
    path: string,
    options: { readonly start?: number | undefined; readonly signal?: AbortSignal | undefined } = {},
  ): Promise<ReadableStream<Uint8Array>> {
    const headers: Record<string, string> = options.start ? { Range: `bytes=${options.start}-` } : {};
    const response = await this.#http.http("GET", this.#path(path), { headers, signal: options.signal });
    return response.body ?? new Blob([]).stream();
  }

  #path(path: string): string {
    const encoded = path.split("/").map(encodeURIComponent).join("/");
    return `/v1/tenants/${encodeURIComponent(this.#tenant)}/files/${encoded}`;
  }
}

function encoded(content: FileContent): string {
  return content.data ?? base64(new TextEncoder().encode(content.text));
}
