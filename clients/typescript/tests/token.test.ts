/** The end of a token, as the client meets it at a live gateway. */

import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { Gateway, type GatewayOptions, type LinkStatus, type Tenant } from "../src/index.js";
import { freePort, LiveGateway } from "./live.js";

const live = new LiveGateway();
const opened: Tenant[] = [];

/** Gives tokens that live for so many seconds, and counts how often it was asked. */
class Source {
  asked = 0;
  failures = 0;
  readonly given: string[] = [];

  constructor(
    readonly ttl: number,
    readonly subject = "test",
  ) {}

  readonly ask = async (): Promise<string> => {
    this.asked += 1;
    if (this.failures > 0) {
      this.failures -= 1;
      throw new Error("the key server is away");
    }
    const token = live.sign("demo", this.ttl, this.subject);
    this.given.push(token);
    return token;
  };
}

function tenant(token: GatewayOptions["token"], options = {}): Tenant {
  const made = new Gateway(live.url, token === undefined ? {} : { token }).tenant("demo", {
    backoff: { first: 20, most: 100 },
    ...options,
  });
  opened.push(made);
  return made;
}

function reached(tenant: Tenant, reached: (status: LinkStatus) => boolean): Promise<LinkStatus> {
  return new Promise((resolve) => {
    const look = () => {
      if (!reached(tenant.status)) return;
      stop();
      resolve(tenant.status);
    };
    const stop = tenant.onStatus(look);
    look();
  });
}

function states(tenant: Tenant): string[] {
  const seen: string[] = [];
  tenant.onStatus(({ state }) => seen.at(-1) !== state && seen.push(state));
  return seen;
}

beforeAll(() => live.start("demo"));
beforeEach(() => () => {
  for (const tenant of opened.splice(0)) tenant.close();
});
afterAll(() => live.remove());

describe("a function as token", () => {
  test("is asked with each connection, and serves HTTP too", async () => {
    const source = new Source(600);
    const gateway = new Gateway(live.url, { token: source.ask });
    const client = gateway.tenant("demo", { backoff: { first: 20, most: 100 } });
    opened.push(client);
    expect(await gateway.session()).toMatchObject({ subject: "test" });
    await gateway.tenants();
    expect(source.asked).toBe(1);
    await client.connect();
    client.reconnect();
    await client.connect();
    expect(source.asked).toBe(3);
  });

  test("is renewed before its end without a break, as often as needed", async () => {
    const source = new Source(4);
    const client = tenant(source.ask);
    const seen = states(client);
    const first = await client.connect();
    const exec = await client.exec("for i in 1 2 3 4 5 6 7 8 9 10; do echo $i; sleep 1; done");
    expect(await exec.stdout.text()).toBe("1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n");
    expect((await exec.exit).code).toBe(0);
    expect(seen).toEqual(["connecting", "open"]);
    expect(source.asked).toBeGreaterThanOrEqual(3);
    expect(source.asked).toBeLessThan(8);
    expect(client.status.expires).toBeGreaterThan(first.expires ?? 0);
  });

  test("that fails is told, and asked again until there is a token", async () => {
    const source = new Source(4);
    const client = tenant(source.ask);
    const seen = states(client);
    const { expires = 0 } = await client.connect();
    source.failures = 3;
    const told = await reached(client, ({ error }) => error !== null);
    expect(told).toMatchObject({ state: "open", error: { code: "unavailable" } });
    expect(told.error?.message).toContain("the key server is away");
    const after = await reached(client, (status) => (status.expires ?? 0) > expires);
    expect(after).toMatchObject({ state: "open", error: null });
    expect(seen).toEqual(["connecting", "open"]);
  });

  test("that fails until the end has the work go on as soon as it gives a token again", async () => {
    const source = new Source(2);
    const client = tenant(source.ask);
    await client.connect();
    const exec = await client.exec("read line; echo got $line", { stdin: true });
    source.failures = Number.POSITIVE_INFINITY;
    await reached(client, ({ state }) => state === "reconnecting");
    source.failures = 0;
    await reached(client, ({ state }) => state === "open");
    while (!exec.attached) await new Promise((resolve) => exec.on("attached", resolve));
    await exec.write("on\n");
    expect(await exec.stdout.text()).toBe("got on\n");
  });

  test("has the events of the gateway go on over the end of each token", async () => {
    const source = new Source(2);
    const ending = new AbortController();
    const connected: boolean[] = [];
    const events = new Gateway(live.url, { token: source.ask }).events({
      types: ["exec.started"],
      signal: ending.signal,
      onConnected: (is) => connected.push(is),
    });
    const seen: unknown[] = [];
    const reading = (async () => {
      for await (const { data } of events) seen.push(data.exec);
    })();
    const client = tenant(live.sign("demo", 600));
    const ran: string[] = [];
    await expect.poll(() => connected.length).toBe(1);
    while (connected.filter((is) => is).length < 3) {
      ran.push((await client.exec("sleep 0.2")).id);
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
    await expect.poll(() => seen).toEqual(ran);
    expect(source.asked).toBeGreaterThanOrEqual(3);
    ending.abort();
    await reading;
  });

  test("is asked once more where the gateway refuses what it gave", async () => {
    const bad = ["nobody", "nobody", ""];
    const source = new Source(600);
    const ask = () => bad.shift() || source.ask();
    expect(await new Gateway(live.url, { token: ask }).tenants().catch(({ code }) => code)).toBe(
      "unauthorized",
    );
    bad.splice(0, bad.length, "nobody");
    expect(await new Gateway(live.url, { token: ask }).tenants()).toHaveLength(1);
    bad.push("nobody");
    await tenant(ask).connect();
    let asked = 0;
    const never = tenant(() => {
      asked += 1;
      return "nobody";
    });
    await expect(never.connect()).rejects.toMatchObject({ code: "unauthorized" });
    expect([asked, never.status.state]).toEqual([2, "closed"]);
  });

  test("that gives another subject's token is told, and the connection goes on to its end", async () => {
    const source = new Source(5);
    const stranger = new Source(600, "somebody else");
    const client = tenant(() => (source.asked === 0 ? source.ask() : stranger.ask()));
    await client.connect();
    const told = await reached(client, ({ error }) => error !== null);
    expect(told.state).toBe("open");
    expect(["forbidden", "unauthorized"]).toContain(told.error?.code);
    expect((await client.files.list(".")).path).toBeDefined();
  });
});

describe("a token without a successor", () => {
  test("ends its connection within a second of its end, and nothing is asked again", async () => {
    const client = tenant(live.sign("demo", 2));
    const { expires = 0 } = await client.connect();
    const status = await reached(client, ({ state }) => state === "closed");
    expect(Date.now() / 1000 - expires).toBeLessThan(5); // one, and what a busy machine takes
    expect(status.error).toMatchObject({ code: "unauthorized" });
    await expect(client.files.list(".")).rejects.toMatchObject({ code: "unauthorized" });
  });

  test("is replaced by hand on the open connection", async () => {
    const client = tenant(live.sign("demo", 3));
    const seen = states(client);
    await client.connect();
    const { expires, scopes } = await client.renew(live.sign("demo", 600));
    expect(expires).toBeGreaterThan(Date.now() / 1000 + 500);
    expect(scopes).toContain("exec");
    const exec = await client.exec("sleep 4; echo still here");
    expect(await exec.stdout.text()).toBe("still here\n");
    expect(seen).toEqual(["connecting", "open"]);
    const wrong = client.renew(live.sign("demo", 600, "somebody else"));
    await expect(wrong).rejects.toMatchObject({ name: "GatewayError" });
    expect(client.status.state).toBe("open");
  });
});

describe("a newer token with less rights", () => {
  test("ends what it does not allow, and each is told why", async () => {
    const client = tenant(live.sign("demo", 600));
    const exec = await client.exec("sleep 100");
    const events = (await client.events())[Symbol.asyncIterator]();
    const changes = (await client.watch(["."]))[Symbol.asyncIterator]();
    const until = async (all: AsyncIterator<unknown>) => {
      while (!(await all.next()).done);
    };
    const ends = [exec.exit, until(events), until(changes)];
    const forbidden = ends.map((end) => expect(end).rejects.toMatchObject({ code: "forbidden" }));
    const { scopes } = await client.renew(live.sign("demo", 600, "test", "deploy"));
    expect(scopes).not.toContain("exec");
    await Promise.all(forbidden);
    expect(client.status.state).toBe("open");
  });
});

describe("the session of a browser", () => {
  /** Keeps cookies as a browser does, for both ways to the gateway. */
  function browser() {
    const jar = new Map<string, string>();
    const cookies = () => [...jar].map(([name, value]) => `${name}=${value}`).join("; ");
    const get: typeof fetch = async (url, init) => {
      const response = await fetch(url, { ...init, headers: { ...init?.headers, Cookie: cookies() } });
      for (const line of response.headers.getSetCookie()) {
        const [, name = "", value = ""] = /^([^=]+)=([^;]*)/.exec(line) ?? [];
        if (/max-age=0/i.test(line)) jar.delete(name);
        else jar.set(name, value);
      }
      return response;
    };
    return { jar, cookies, fetch: get };
  }

  test("has a slot of its own beside others, on every way", async () => {
    const { WebSocket } = await import("ws");
    const own = browser();
    class Socket extends WebSocket {
      constructor(url: string, protocols?: string | string[]) {
        super(url, protocols, { headers: { Cookie: own.cookies() } });
      }
    }
    const make = (slot: string) =>
      new Gateway(live.url, { slot, fetch: own.fetch, WebSocket: Socket as never });
    const [one, two] = [make("one"), make("two")];
    await one.signIn(live.sign("demo", 600, "one"));
    await two.signIn(live.sign("demo", 3, "two"));
    expect([...own.jar.keys()].sort()).toEqual(["gateway_session_one", "gateway_session_two"]);
    expect([(await one.session()).subject, (await two.session()).subject]).toEqual(["one", "two"]);
    const client = two.tenant("demo", { backoff: { first: 20, most: 100 } });
    opened.push(client);
    await client.connect();

    // its session ends while something runs: all waits, and goes on once the browser has signed in again
    const exec = await client.exec("read line; echo got $line", { stdin: true });
    await reached(client, ({ state }) => state === "unauthorized");
    await expect(client.files.list(".")).rejects.toMatchObject({ code: "unauthorized" });
    await expect(two.session()).rejects.toMatchObject({ code: "unauthorized" });
    await two.signIn(live.sign("demo", 600, "two"));
    client.retry();
    await client.connect();
    while (!exec.attached) await new Promise((resolve) => exec.on("attached", resolve));
    await exec.write("on\n");
    expect(await exec.stdout.text()).toBe("got on\n");

    await two.signOut();
    expect([...own.jar.keys()]).toEqual(["gateway_session_one"]);
    expect((await one.session()).subject).toBe("one");
  });
});

describe("a first connection", () => {
  test("to a port where nobody listens fails at once, and says where", async () => {
    const url = `http://127.0.0.1:${await freePort()}`;
    const client = new Gateway(url, { token: "any" }).tenant("demo");
    opened.push(client);
    const began = performance.now();
    const failure = client.exec("true");
    await expect(failure).rejects.toMatchObject({ name: "Disconnected", code: "unavailable" });
    await expect(failure).rejects.toThrow(url);
    expect(performance.now() - began).toBeLessThan(3000);
    expect(client.status.state).toBe("idle");
  });

  test("may insist, and is then made once somebody listens", async () => {
    const own = new LiveGateway();
    own.port = await freePort();
    const client = new Gateway(own.url, { token: () => own.sign("demo", 600) }).tenant("demo", {
      insist: true,
      backoff: { first: 20, most: 100 },
    });
    const connected = client.connect();
    await reached(client, ({ attempt }) => attempt > 0);
    await own.start("demo");
    expect((await connected).tenant).toBe("demo");
    client.close();
    await own.remove();
  });
});
