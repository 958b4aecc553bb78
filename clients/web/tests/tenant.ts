/** A tenant's files in memory, with etags and conflicts as the gateway has them. */

import { type Entry, type FileContent, GatewayError, type Tenant, type Written } from "@incus-gateway/client";

export class Shelf {
  readonly #files = new Map<string, { text: string; etag: string }>();
  #count = 0;

  constructor(files: Readonly<Record<string, string>>) {
    for (const [path, text] of Object.entries(files)) this.put(path, text);
  }

  /** Writes as somebody else does. */
  put(path: string, text: string): string {
    const etag = `e${++this.#count}`;
    this.#files.set(path, { text, etag });
    return etag;
  }

  text(path: string): string | undefined {
    return this.#files.get(path)?.text;
  }

  delete(path: string): void {
    this.#files.delete(path);
  }

  #file(path: string) {
    const found = this.#files.get(path);
    if (found === undefined) throw new GatewayError("not_found", `no file ${path}`);
    return found;
  }

  #entry(path: string): Entry {
    const { text, etag } = this.#file(path);
    return { path, type: "file", size: text.length, mode: 0o644, mtime: 0, etag };
  }

  /** What happens between a request and its answer, once. */
  meanwhile: { write?: () => unknown; read?: () => unknown } = {};

  async #late<Answer>(name: "write" | "read", answer: Answer): Promise<Answer> {
    const happens = this.meanwhile[name];
    delete this.meanwhile[name];
    await happens?.();
    return answer;
  }

  get tenant(): Tenant {
    const files = {
      stat: async (path: string) => this.#entry(path),
      read: async (path: string): Promise<FileContent> => {
        const { text, etag } = this.#file(path);
        return this.#late("read", { text, etag, encoding: "utf-8", size: text.length, mode: 0o644 });
      },
      write: async (
        path: string,
        text: string,
        { ifMatch, ifNoneMatch }: { ifMatch?: string; ifNoneMatch?: "*" },
      ): Promise<Written> => {
        const present = this.#files.get(path);
        if (ifNoneMatch === "*" ? present !== undefined : present?.etag !== ifMatch)
          throw new GatewayError("conflict", "changed", { etag: present?.etag ?? null });
        const etag = this.put(path, text);
        return this.#late("write", { etag, size: text.length, created: present === undefined });
      },
      move: async (from: string, to: string) => {
        const { text } = this.#file(from);
        this.#files.delete(from);
        this.put(to, text);
        return this.#entry(to);
      },
    };
    return { files } as unknown as Tenant;
  }
}
