/** A tenant's files for an editor. Paths are absolute, or relative to the workspace. */

import { Disconnected, GatewayError } from "./errors.js";
import type { Link } from "./link.js";
import type { Entry, FileContent, Listing, Written } from "./types.js";

export interface WriteOptions {
  /** Refuse with `conflict` where the file is not in this state any more; facts hold its present `etag`. */
  readonly ifMatch?: string;
  /** `"*"`: refuse with `conflict` where there is one. */
  readonly ifNoneMatch?: "*";
  readonly createDirs?: boolean;
}

export class Files {
  readonly #link: Link;

  /** @internal */
  constructor(link: Link) {
    this.#link = link;
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
   * Writes a whole file. Where the connection breaks before the answer it is asked again, and a `conflict`
   * with what we had written ourselves is no conflict.
   */
  async write(path: string, text: string, options: WriteOptions = {}): Promise<Written> {
    let broken = false;
    for (;;) {
      try {
        return await this.#link.request<Written>("files/write", { path, text, ...options });
      } catch (error) {
        if (error instanceof Disconnected && this.#link.status.state !== "closed" && !broken) {
          broken = true;
          continue;
        }
        if (!broken || !(error instanceof GatewayError) || error.code !== "conflict") throw error;
        const present = await this.read(path);
        if (present.text !== text) throw error;
        return { etag: present.etag, size: present.size, created: options.ifNoneMatch === "*" };
      }
    }
  }

  move(
    from: string,
    to: string,
    options: { overwrite?: boolean; createDirs?: boolean } = {},
  ): Promise<Entry> {
    return this.#link.request("files/move", { from, to, ...options });
  }

  remove(
    path: string,
    options: { recursive?: boolean; ifMatch?: string } = {},
  ): Promise<{ removed: number }> {
    return this.#link.request("files/remove", { path, ...options });
  }

  mkdir(path: string, createDirs = true): Promise<Entry> {
    return this.#link.request("files/mkdir", { path, createDirs });
  }
}
