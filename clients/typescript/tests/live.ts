/** A gateway of the `local` runtime as a process, and a wire to it that can be cut. */

import { type ChildProcess, spawn } from "node:child_process";
import { createHmac, randomBytes } from "node:crypto";
import { mkdtempSync, rmSync } from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

const ROOT = new URL("../../..", import.meta.url).pathname;
const SECRET = "a secret of the tests, long enough to sign with";
const SCOPES = "files:read files:write exec deploy manage events";

export function freePort(): Promise<number> {
  return new Promise((resolve) => {
    const probe = createServer().listen(0, "127.0.0.1", () => {
      const { port } = probe.address() as { port: number };
      probe.close(() => resolve(port));
    });
  });
}

export class LiveGateway {
  readonly #state = mkdtempSync(join(tmpdir(), "gateway-web-"));
  #process: ChildProcess | null = null;
  #log = "";
  port = 0;

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  get #environment() {
    return {
      PATH: process.env.PATH,
      GATEWAY_CONFIG: "/nonexistent",
      GATEWAY_SECRET: SECRET,
      GATEWAY_RUNTIME: "local",
      GATEWAY_STATE_DIR: this.#state,
      GATEWAY_LISTEN: `127.0.0.1:${this.port}`,
    };
  }

  token(tenant: string, scopes = SCOPES): string {
    return this.sign(tenant, 600, "test", scopes);
  }

  /** Returns a token that lives for `ttl` seconds. */
  sign(tenant: string, ttl: number, subject = "test", scope = SCOPES): string {
    const now = Math.floor(Date.now() / 1000);
    const claims = { sub: subject, tenants: [tenant], scope, iat: now, exp: now + ttl };
    const parts = [
      { alg: "HS256", typ: "JWT" },
      { ...claims, jti: randomBytes(16).toString("hex") },
    ];
    const text = parts.map((part) => Buffer.from(JSON.stringify(part)).toString("base64url")).join(".");
    return `${text}.${createHmac("sha256", SECRET).update(text).digest("base64url")}`;
  }

  /** Starts it with new tenants, and returns once it is ready. */
  async start(...tenants: string[]): Promise<void> {
    this.port ||= await freePort();
    const words = ["-m", "tests.serve_local", ...tenants];
    const child = spawn("python", words, { cwd: ROOT, env: this.#environment });
    this.#process = child;
    child.stderr.on("data", (data) => {
      this.#log += data;
    });
    for (;;) {
      if (child.exitCode !== null) throw new Error(this.#log);
      const ready = await fetch(`${this.url}/readyz`).catch(() => null);
      if (ready?.ok) return;
      await new Promise((resolve) => setTimeout(resolve, 20)); // nothing to wait on but the port itself
    }
  }

  /** Ends it by a signal and returns its exit code. */
  async stop(signal: NodeJS.Signals = "SIGTERM"): Promise<number | null> {
    const child = this.#process;
    if (child === null || child.exitCode !== null) return child?.exitCode ?? null;
    const ended = new Promise<number | null>((resolve) => child.once("exit", resolve));
    child.kill(signal);
    return await ended;
  }

  async remove(): Promise<void> {
    await this.stop();
    rmSync(this.#state, { recursive: true });
  }
}

/** A proxy of bytes between a client and the gateway, which can be cut and joined again. */
export class Wire {
  readonly #sockets = new Set<Socket>();
  readonly #server: Server;
  #cut = false;
  #muted = false;
  url = "";

  constructor(gateway: LiveGateway) {
    this.#server = createServer((near) => {
      if (this.#cut) {
        near.destroy();
        return;
      }
      const far = connect(gateway.port, "127.0.0.1");
      for (const [socket, other] of [
        [near, far],
        [far, near],
      ] as const) {
        this.#sockets.add(socket);
        socket.on("error", () => {});
        socket.on("close", () => {
          this.#sockets.delete(socket);
          other.destroy();
        });
        socket.on("data", (data) => {
          if (socket === near || !this.#muted) other.write(data);
        });
      }
    });
  }

  async open(): Promise<this> {
    await new Promise<void>((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
    this.url = `http://127.0.0.1:${(this.#server.address() as { port: number }).port}`;
    return this;
  }

  cut(): void {
    this.#cut = true;
    for (const socket of this.#sockets) socket.destroy();
  }

  /** Lets what the gateway says get lost, until the wire is joined again. */
  mute(): void {
    this.#muted = true;
  }

  join(): void {
    this.#cut = this.#muted = false;
  }

  close(): void {
    this.cut();
    this.#server.close();
  }
}
