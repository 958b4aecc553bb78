/** The client against a live gateway of plain processes: everything is real but the isolation. */

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, test, vi } from "vitest";
import { packed } from "../src/folder.js";
import { type Exec, Gateway, type GatewayEvent, type LinkState, type Tenant } from "../src/index.js";
import { LiveGateway, Wire } from "./live.js";

const live = new LiveGateway();
let wire: Wire;
let gateway: Gateway;
let token: string;
const opened: Tenant[] = [];

function tenant(options = {}): Tenant {
  const made = gateway.tenant("demo", { backoff: { first: 20, most: 100 }, ...options });
  opened.push(made);
  return made;
}

function reached(tenant: Tenant, state: LinkState): Promise<void> {
  return new Promise((resolve) => {
    const look = () => {
      if (tenant.status.state !== state) return;
      stop();
      resolve();
    };
    const stop = tenant.onStatus(look);
    look();
  });
}

/** Reads a command's output until it holds `text`. */
async function until(exec: Exec, text: string): Promise<string> {
  let seen = "";
  while (!seen.includes(text)) {
    const chunk = exec.stdout.take();
    if (chunk === undefined) await exec.stdout.changed();
    else seen += Buffer.from(chunk).toString();
  }
  return seen;
}

beforeAll(async () => {
  await live.start("demo", "other");
  token = live.token("demo");
});
beforeEach(async () => {
  wire = await new Wire(live).open();
  gateway = new Gateway(wire.url, { token });
  return () => {
    for (const tenant of opened.splice(0)) tenant.close();
    wire.close();
  };
});
afterAll(() => live.remove());

describe("a gateway", () => {
  test("says what a tenant can go back to, and refuses what has no site", async () => {
    const demo = tenant();
    expect(await demo.deployments()).toEqual({ deployments: [], live: null, kept: [] });
    expect([await demo.variables(), await demo.environment()]).toEqual([[], {}]);
    await expect(demo.rollback()).rejects.toMatchObject({ code: "conflict" });
    await expect(demo.changeEnvironment({ A: null })).rejects.toMatchObject({ code: "conflict" });
    await expect(gateway.tenant("other").deployments()).rejects.toMatchObject({ code: "not_found" });
  });

  test("lists tenants and says who we are", async () => {
    expect((await gateway.tenants()).map((tenant) => tenant.name)).toEqual(["demo"]);
    const session = await gateway.session();
    expect(session).toMatchObject({ tenants: ["demo"] });
    expect(session.scopes).toContain("exec");
  });

  test("refuses a wrong token with its typed code, on both ways", async () => {
    const wrong = new Gateway(wire.url, { token: "nobody" });
    await expect(wrong.tenants()).rejects.toMatchObject({ code: "unauthorized" });
    await expect(wrong.tenant("demo").connect()).rejects.toMatchObject({ code: "unauthorized" });
    const foreign = gateway.tenant("other");
    await expect(foreign.connect()).rejects.toMatchObject({ code: "not_found" });
    expect(foreign.status.state).toBe("closed");
  });
});

describe("files", () => {
  test("are written, read, refused when stale, moved and removed", async () => {
    const { files } = tenant();
    const first = await files.write("a/é ✓.txt", "one\r\n", { createDirs: true });
    expect(first.created).toBe(true);
    expect(await files.read("a/é ✓.txt")).toMatchObject({ text: "one\r\n", etag: first.etag });
    const second = await files.write("a/é ✓.txt", "two", { ifMatch: first.etag });
    const stale = files.write("a/é ✓.txt", "three", { ifMatch: first.etag });
    await expect(stale).rejects.toMatchObject({ code: "conflict", facts: { etag: second.etag } });
    await files.move("a/é ✓.txt", "b.txt");
    expect((await files.list(".")).entries.map((entry) => entry.path)).toEqual(
      expect.arrayContaining(["a", "b.txt"]),
    );
    await files.remove("b.txt");
    await expect(files.stat("b.txt")).rejects.toMatchObject({ code: "not_found" });
  });

  test("too large for the wire are refused, and harm nothing else on it", async () => {
    const demo = tenant();
    const other = demo.tool("Bash", { command: "sleep 1; echo still here" });
    await demo.connect();
    for (const text of ["x".repeat(17 << 20), "ä".repeat(9 << 20)]) {
      await expect(demo.files.write("big.txt", text)).rejects.toMatchObject({
        code: "too_large",
        facts: { limit: 16 << 20 },
      });
    }
    expect((await other).content[0]).toMatchObject({ text: "still here" });
    expect(demo.status.state).toBe("open");
  });

  test("are watched, also across a broken connection", async () => {
    const client = tenant();
    await client.files.mkdir("watched");
    const watch = await client.watch(["watched"]);
    const changes = watch[Symbol.asyncIterator]();
    await client.files.write("watched/one", "1");
    const next = async () => (await changes.next()).value;
    expect((await next()).changes).toContainEqual({ path: "watched/one", change: "created" });
    wire.cut();
    await reached(client, "reconnecting");
    wire.join();
    let told = await next();
    while (!told.overflow) told = await next(); // a change of the same file may have come before the cut
    expect(told).toEqual({ changes: [], overflow: true });
    await client.files.write("watched/two", "2");
    expect((await next()).changes).toContainEqual({ path: "watched/two", change: "created" });
  });

  test("of any size go up and down as streams, at their reader's pace", async () => {
    const client = tenant();
    const chunk = new Uint8Array(1 << 20).fill(97);
    let left = 24; // more than a message of the websocket may have
    const body = new ReadableStream<Uint8Array>({
      pull: (stream) => (left-- > 0 ? stream.enqueue(chunk) : stream.close()),
    });
    const written = await client.files.upload("up/ä %41?.bin", body);
    expect(written).toMatchObject({ size: 24 << 20, created: true });
    const stale = client.files.upload("up/ä %41?.bin", "x", { ifMatch: "another" });
    await expect(stale).rejects.toMatchObject({ code: "conflict" });
    let size = 0;
    for await (const part of await client.files.download("up/ä %41?.bin", { start: 1 << 20 }))
      size += part.length;
    expect(size).toBe(23 << 20);
    await client.files.write("up/bytes", Uint8Array.of(0, 255, 128));
    expect(await client.files.read("up/bytes")).toMatchObject({ encoding: "base64", data: "AP+A" });
  });
});

describe("tools", () => {
  test("have methods of their own, whose failures are thrown", async () => {
    const client = tenant();
    await client.write("typed/a.ts", "one\ntwo\n");
    expect((await client.read("typed/a.ts", { limit: 1 })).text).toContain("1\tone");
    await client.edit("typed/a.ts", "two", "three");
    const found = await client.grep("THREE", { path: "typed", ignoreCase: true, outputMode: "content" });
    expect(found.text).toBe("typed/a.ts:2:three");
    expect((await client.glob("*.ts", { path: "typed" })).text).toBe("typed/a.ts");
    await expect(client.read("typed/none")).rejects.toMatchObject({ code: "not_found" });
    expect(await client.bash("echo out; exit 3")).toMatchObject({
      status: "failed",
      exitCode: 3,
      isError: true,
    });
    const behind = await client.bash("echo begun; sleep 99", { background: true });
    while (!(await client.bashOutput(behind.shellId ?? "")).text.includes("begun"));
    expect((await client.killShell(behind.shellId ?? "")).text).toContain("Successfully killed");
    expect(await client.run(["sh", "-c", "cat; exit 4"], { stdin: "in" })).toMatchObject({
      exitCode: 4,
      stdout: "in",
    });
    expect((await client.tools()).map(({ name }) => name)).toContain("KillShell");
    await client.ping();
  });

  test("answer in the shape of an MCP result, failures in their own terms included", async () => {
    const client = tenant();
    await client.tool("Write", { file_path: "t.txt", content: "needle\n" });
    const found = await client.tool("Grep", { pattern: "needle", output_mode: "content" });
    expect(found.isError).toBe(false);
    expect(found.content[0]).toMatchObject({ type: "text" });
    const missing = await client.tool("Read", { file_path: "no.txt" });
    expect(missing).toMatchObject({ isError: true, structuredContent: { code: "not_found" } });
    await expect(client.tool("Nothing", {})).rejects.toMatchObject({ code: "not_found" });
  });

  test("are called once, though the answer was lost with the connection", async () => {
    const client = tenant();
    await client.files.write("once.txt", "a");
    const direct = new Gateway(live.url, { token }).tenant("demo");
    opened.push(direct);
    wire.mute();
    const edit = { file_path: "once.txt", old_string: "a", new_string: "b" };
    const call = client.tool("Edit", edit);
    while ((await direct.files.read("once.txt")).text !== "b");
    wire.cut();
    wire.join();
    expect(await call).toMatchObject({ isError: false }); // a second edit would find no "a"
  });

  test("go on where the connection broke in the middle, and are not run a second time", async () => {
    const client = tenant();
    const direct = new Gateway(live.url, { token }).tenant("demo");
    opened.push(direct);
    const command = "echo x >> cut.txt; while [ ! -e go ]; do sleep 0.01; done; echo went on";
    const call = client.tool("Bash", { command });
    const seen = async () => (await direct.files.read("cut.txt").catch(() => null))?.text;
    while ((await seen()) !== "x\n");
    wire.cut();
    await reached(client, "reconnecting");
    wire.join();
    await reached(client, "open");
    await direct.files.write("go", "");
    expect(await call).toMatchObject({ isError: false, content: [{ text: "went on" }] });
    expect(await seen()).toBe("x\n");
  });

  test("are cancelled by a signal, and what they ran is killed", async () => {
    const client = tenant();
    const ending = new AbortController();
    const call = client.tool("Bash", { command: "sleep 987" }, { signal: ending.signal });
    const running = async () => (await client.execs()).filter((exec) => exec.state === "running");
    while ((await running()).length === 0);
    ending.abort();
    await expect(call).rejects.toMatchObject({ code: "cancelled" });
    while ((await running()).length > 0);
  });
});

describe("commands", () => {
  test("stream both outputs, take input, and tell their exit", async () => {
    const exec = await tenant().exec("read line; echo out $line; echo err >&2; exit 3", { stdin: true });
    await exec.write("hello\n");
    const [out, err] = await Promise.all([exec.stdout.text(), exec.stderr.text()]);
    expect([out, err]).toEqual(["out hello\n", "err\n"]);
    expect(await exec.wait()).toMatchObject({ code: 3, signal: null, reason: "exited" });
  });

  test("yield both streams in one iteration, and ask for nothing after their end", async () => {
    const exec = await tenant().exec(["sh", "-c", "echo a; echo b >&2"]);
    const seen: Record<string, string> = { stdout: "", stderr: "" };
    for await (const { stream, data } of exec.output()) seen[stream] += Buffer.from(data).toString();
    expect(seen).toEqual({ stdout: "a\n", stderr: "b\n" });
  });

  test("have terminals that know their size", async () => {
    const exec = await tenant().exec("stty size; read _; stty size", { pty: { cols: 91, rows: 17 } });
    await until(exec, "17 91");
    await exec.resize({ cols: 120, rows: 40 });
    await exec.write("\n");
    await until(exec, "40 120");
    expect((await exec.exit).code).toBe(0);
  });

  test("go on at the byte at which the connection broke", async () => {
    const client = tenant();
    const exec = await client.exec(
      "for i in $(seq 2000); do echo line $i; [ $((i % 100)) = 0 ] && sleep 0.02; done",
    );
    let text = "";
    let cuts = 0;
    for await (const chunk of exec.stdout) {
      text += Buffer.from(chunk).toString();
      if (cuts < 3 && text.length > (cuts + 1) * 4000) {
        cuts += 1;
        wire.cut();
        await reached(client, "reconnecting");
        wire.join();
        await reached(client, "open");
      }
    }
    expect(cuts).toBe(3);
    expect(text).toBe(Array.from({ length: 2000 }, (_, i) => `line ${i + 1}\n`).join(""));
    expect(await exec.exit).toMatchObject({ code: 0, reason: "exited" });
    expect(exec.stdout.lost).toBe(0);
  });

  test("refuse input while the connection is broken, rather than keep it for later", async () => {
    const client = tenant();
    const exec = await client.exec("cat", { stdin: true });
    wire.cut();
    await reached(client, "reconnecting");
    await expect(exec.write("late\n")).rejects.toMatchObject({ name: "Disconnected" });
    wire.join();
    await reached(client, "open");
    while (!exec.attached) await new Promise((resolve) => exec.on("attached", resolve));
    await exec.write("now\n");
    await until(exec, "now\n");
    expect(await exec.cancel()).toMatchObject({ survivors: 0 });
    expect(await exec.exit).toMatchObject({ reason: "cancelled" });
  });

  test("get each byte of their input once, though the connection broke while it was sent", async () => {
    const client = tenant();
    const exec = await client.exec("cat > received; wc -c < received", { stdin: true });
    const line = `${"x".repeat(999)}\n`;
    for (let sent = 0; sent < 200; sent++) {
      await exec.write(line);
      if (sent % 50 === 20) {
        wire.cut(); // some of what was written is under way
        await reached(client, "reconnecting");
        wire.join();
        await reached(client, "open");
        while (!exec.attached) await new Promise((resolve) => exec.on("attached", resolve));
      }
    }
    await exec.closeStdin();
    expect((await exec.stdout.text()).trim()).toBe("200000");
  });

  test("are found again by their id, from the first byte", async () => {
    const client = tenant();
    const first = await client.exec("echo before; read _; echo after", { stdin: true, lingerMs: 10_000 });
    await until(first, "before");
    await first.detach();
    const again = await client.attach(first.id);
    await again.write("\n");
    expect(await again.stdout.text()).toBe("before\nafter\n");
  });

  test("are read by several at once, each with all of the output and its own end", async () => {
    const client = tenant();
    const size = 3 << 20;
    const line = `read _; head -c ${size} /dev/zero; read _; echo end`;
    const first = await client.exec(line, { stdin: true, buffer: 1 << 20 });
    const second = await client.attach(first.id, {}, { buffer: 1 << 20 });
    const leaving = await client.attach(first.id);
    await leaving.detach();
    await second.write("\n");
    const read = async (exec: Exec) => {
      let seen = 0;
      for await (const chunk of exec.stdout) seen += chunk.length;
      return { seen, lost: exec.stdout.lost, code: (await exec.exit).code };
    };
    const both = Promise.all([read(first), read(second)]);
    await first.write("\n");
    const whole = { seen: size + 4, lost: 0, code: 0 };
    expect(await both).toEqual([whole, whole]);
    expect(await second.cancel()).toMatchObject({ survivors: 0 }); // also of one that has ended
    const listed = (await client.execs()).find((one) => one.exec === first.id);
    expect(listed).toMatchObject({ state: "ended", attached: 0 });
  });

  test("a buffer larger than what the gateway sends ahead is no standstill", async () => {
    const size = 12 << 20;
    const exec = await tenant().exec(`head -c ${size} /dev/zero`, { buffer: 256 << 20 });
    let got = 0;
    for await (const chunk of exec.stdout) got += chunk.length;
    expect(got).toBe(size);
  });

  test("wait for who reads slowly, lose nothing, and hold nothing else up", async () => {
    const client = tenant();
    const size = 24 << 20;
    const exec = await client.exec(`head -c ${size} /dev/zero; echo end`, { buffer: 1 << 20 });
    let most = 0;
    let seen = 0;
    let end = "";
    for await (const chunk of exec.stdout) {
      if (seen === 0) {
        // it stands still: what else is on the socket goes on
        const other = await client.exec("echo other");
        expect(await other.stdout.text()).toBe("other\n");
        expect((await other.exit).code).toBe(0);
      }
      most = Math.max(most, exec.stdout.size);
      seen += chunk.length;
      end = Buffer.from(chunk.subarray(-4)).toString();
    }
    expect(end).toBe("end\n");
    expect([seen, exec.stdout.lost, exec.stdout.offset]).toEqual([size + 4, 0, size + 4]);
    expect(most).toBeLessThanOrEqual(1 << 20);
    expect((await exec.exit).code).toBe(0);
  });

  test("wait no longer for who has stopped reading", async () => {
    const exec = await tenant().exec("seq 400000", { buffer: 1 << 18 });
    for await (const _ of exec.stdout) break;
    expect((await exec.exit).code).toBe(0);
    const other = await tenant().exec("seq 400000 >&2; seq 400000", { buffer: 1 << 18 });
    for await (const { stream } of other.output()) if (stream === "stdout") break;
    expect((await other.exit).code).toBe(0);
  });

  test("lose nothing of what waits when the connection breaks", async () => {
    const client = tenant();
    const exec = await client.exec("seq 1000000", { buffer: 1 << 20 });
    let text = "";
    for await (const chunk of exec.stdout) {
      if (text.length < 3 << 20 && text.length + chunk.length >= 3 << 20) {
        wire.cut();
        wire.join();
      }
      text += Buffer.from(chunk).toString();
    }
    expect(exec.stdout.lost).toBe(0);
    expect(text.length).toBe(6_888_896);
    expect(text.endsWith("\n999999\n1000000\n")).toBe(true);
  });

  test("come in whole characters where they are asked for", async () => {
    const script =
      "i=0; while [ $i -lt 200 ]; do printf '\\342\\202'; sleep 0.001; printf '\\254'; i=$((i+1)); done";
    const exec = await tenant().exec(["sh", "-c", script], { encoding: "utf-8" });
    let text = "";
    for await (const chunk of exec.stdout) text += new TextDecoder("utf-8", { fatal: true }).decode(chunk);
    expect(text).toBe("€".repeat(200));
  });

  test("tell how much of them runs on after their end", async () => {
    const client = tenant();
    const exec = await client.exec("sleep 60 >/dev/null 2>&1 & echo left");
    expect(await exec.exit).toMatchObject({ code: 0, left: 1 });
    const names = async () => {
      const found = (await client.execs()).find((one) => one.exec === exec.id);
      return found?.left?.map(({ name }) => name);
    };
    await expect.poll(names, { timeout: 10_000 }).toEqual(["sleep"]); // bash at first
    expect(await exec.cancel(0)).toMatchObject({ killed: 1, survivors: 0 });
  });

  test("keep the end of what nobody reads at all", async () => {
    const exec = await tenant().exec("seq 400000", { buffer: 1 << 20 });
    expect((await exec.exit).code).toBe(0);
    let kept = "";
    for await (const chunk of exec.stdout) kept += Buffer.from(chunk).toString();
    expect(kept.endsWith("399999\n400000\n")).toBe(true);
  });

  test("that nobody read in time are no whole text, and say so", async () => {
    const exec = await tenant().exec("head -c 20000000 /dev/zero");
    expect((await exec.wait()).code).toBe(0);
    await expect(exec.stdout.text()).rejects.toMatchObject({ code: "too_large" });
    const whole = await tenant().exec("head -c 20000000 /dev/zero");
    const [text, { code }] = await Promise.all([whole.stdout.text(), whole.wait()]);
    expect([text.length, code]).toEqual([20_000_000, 0]);
  });

  test("take a stream as input over breaks, each byte once", async () => {
    const client = tenant();
    const exec = await client.exec("md5sum", { stdin: true });
    const size = 1 << 18;
    let sent = 0;
    const input = new ReadableStream<Uint8Array>({
      async pull(stream) {
        if (sent === 40) return stream.close();
        if (sent % 10 === 5) {
          wire.cut();
          setTimeout(() => wire.join(), 150);
        }
        stream.enqueue(new Uint8Array(size).fill(sent++));
      },
    });
    await input.pipeTo(exec.stdin);
    const hash = createHash("md5");
    for (let number = 0; number < 40; number++) hash.update(new Uint8Array(size).fill(number));
    expect((await exec.stdout.text()).split(" ")[0]).toBe(hash.digest("hex"));
  });

  test("are piped from and into streams", async () => {
    const exec = await tenant().exec("tr a-z A-Z", { stdin: true });
    const input = new Blob(["made ", "large\n"]).stream();
    const [out] = await Promise.all([new Response(exec.stdout.readable).text(), input.pipeTo(exec.stdin)]);
    expect(out).toBe("MADE LARGE\n");
    expect(await exec.exit).toMatchObject({ code: 0 });
  });

  test("end with their tree when the signal of who started them aborts", async () => {
    const client = tenant();
    const ending = new AbortController();
    const exec = await client.exec("sleep 987 & echo begun; wait", { signal: ending.signal });
    await until(exec, "begun");
    const leaving = new AbortController();
    const other = await tenant().attach(exec.id, {}, { signal: leaving.signal });
    leaving.abort();
    await expect(other.exit).rejects.toMatchObject({ name: "Disconnected" });
    expect(exec.running).toBe(true);
    ending.abort();
    expect(await exec.exit).toMatchObject({ reason: "cancelled", left: 0 });
    const never = client.exec("sleep 987", { signal: ending.signal });
    await expect(never).rejects.toMatchObject({ code: "cancelled" });
    const looking = new AbortController();
    const watch = await client.watch(["."], { signal: looking.signal });
    looking.abort();
    for await (const _ of watch);
    expect(watch.open).toBe(false);
  });

  test("that cannot start are an error with a reason", async () => {
    await expect(tenant().exec(["/no/such"])).rejects.toMatchObject({ code: "exec_failed" });
  });
});

describe("events", () => {
  test("come over HTTP and resume after the last one that was seen", async () => {
    const ending = new AbortController();
    const filter = { tenants: ["demo"], types: ["exec.*"], signal: ending.signal };
    const stream = gateway.events({ ...filter, onConnected: (is) => connected.push(is) });
    const connected: boolean[] = [];
    const first = stream.next();
    while (connected.length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    const client = tenant();
    const one = await client.exec("true");
    expect((await first).value).toMatchObject({ type: "exec.started", subject: "demo" });
    await one.exit;
    wire.cut();
    wire.join();
    const two = await client.exec("exit 7");
    const seen: GatewayEvent[] = [];
    while (seen.length < 3) seen.push((await stream.next()).value as GatewayEvent);
    expect(seen.map((event) => [event.type, event.data.exec])).toEqual([
      ["exec.exited", one.id],
      ["exec.started", two.id],
      ["exec.exited", two.id],
    ]);
    ending.abort();
    expect((await stream.next()).done).toBe(true);
  });

  test("of a tenant come over its connection, without a gap or a repeat across a break", async () => {
    const client = tenant();
    const events = (await client.events({ types: ["tool.*"] }))[Symbol.asyncIterator]();
    const next = async () => (await events.next()).value as GatewayEvent;
    await client.tool("Glob", { pattern: "*" });
    expect((await next()).data).toMatchObject({ name: "Glob" });
    wire.cut();
    await reached(client, "reconnecting");
    const direct = new Gateway(live.url, { token });
    await direct.json("POST", "/v1/tenants/demo/tools/Grep", { pattern: "x" });
    wire.join();
    const types = [await next(), await next(), await next()].map((event) => [event.type, event.data.name]);
    expect(types).toEqual([
      ["tool.finished", "Glob"],
      ["tool.started", "Grep"],
      ["tool.finished", "Grep"],
    ]);
  });
});

describe("the state of the connection", () => {
  test("is tried again when the ending gateway said, whatever the client's own pauses are", async () => {
    const own = new LiveGateway();
    await own.start("demo");
    const client = new Gateway(own.url, { token: own.token("demo") }).tenant("demo", {
      backoff: { first: 60_000, most: 60_000 },
    });
    const pauses: number[] = [];
    client.onStatus(({ retryAt }) => retryAt !== null && pauses.push(retryAt - Date.now()));
    await client.connect();
    expect(await own.stop()).toBe(0); // it says 2 s
    await expect.poll(() => pauses[0]).toBeLessThanOrEqual(4000);
    client.close();
    await own.remove();
  });

  test("is visible: draining, reconnecting while the gateway is away, open again", async () => {
    const own = new LiveGateway();
    await own.start("demo");
    const client = new Gateway(own.url, { token: own.token("demo") }).tenant("demo", {
      backoff: { first: 20, most: 100 },
    });
    const states: LinkState[] = [];
    client.onStatus(({ state }) => states.at(-1) !== state && states.push(state));
    await client.connect();
    const exec = await client.exec("sleep 100");
    expect(await own.stop()).toBe(0);
    await reached(client, "reconnecting");
    expect(client.status).toMatchObject({ error: { code: "unavailable" } });
    expect(client.status.retryAt).toBeGreaterThan(0);
    await own.start();
    await reached(client, "open");
    expect(states).toEqual(["connecting", "open", "draining", "reconnecting", "open"]);
    expect((await exec.exit).reason).not.toBe("exited");
    client.close();
    await expect(client.files.list()).rejects.toMatchObject({ name: "Disconnected" });
    await own.remove();
  });

  test("is open only while the other end answers", async () => {
    const client = tenant({ heartbeat: 30 });
    await client.connect();
    while (client.status.latency === null) await new Promise((resolve) => setTimeout(resolve, 5));
    expect(client.status.latency).toBeGreaterThan(0);
  });
});

test("a folder is packed as a template, without what the gateway leaves out", async () => {
  const folder = mkdtempSync(join(tmpdir(), "gateway-folder-"));
  try {
    for (const place of ["src", "node_modules/a", "src/node_modules/b", ".git"])
      mkdirSync(join(folder, place), { recursive: true });
    for (const file of [
      "site.toml",
      "src/ä.ts",
      "node_modules/a/x",
      "src/node_modules/b/y",
      ".git/HEAD",
      ".env",
    ])
      writeFileSync(join(folder, file), file);
    const listed = execFileSync("tar", ["-tzf", "-"], { input: await packed(folder), encoding: "utf8" });
    const names = listed
      .trim()
      .split("\n")
      .map((name) => name.replace("\\303\\244", "ä"));
    expect(names.sort()).toEqual([".env", "site.toml", "src/", "src/ä.ts"]);
    await expect(packed(join(folder, "none"))).rejects.toThrow("ENOENT");
  } finally {
    rmSync(folder, { recursive: true });
  }
});

describe("a client", () => {
  test("that is closed by its program ends what it follows, without an error", async () => {
    const client = gateway.tenant("demo");
    const feeds = [await client.watch(["."]), await client.events()];
    const ended = feeds.map(async (feed) => {
      for await (const _ of feed as AsyncIterable<unknown>);
      return "ended";
    });
    client.close();
    expect(await Promise.all(ended)).toEqual(["ended", "ended"]);
  });

  test("takes a token with the line's end of its file, for both kinds of requests", async () => {
    for (const given of [`${token}\n`, async () => ` ${token}\r\n`]) {
      const client = new Gateway(live.url, { token: given });
      using demo = client.tenant("demo");
      expect((await client.tenants()).map(({ name }) => name)).toContain("demo");
      await demo.ping();
    }
    expect(() => new Gateway(live.url, { token: "a\nb" })).toThrow("no token");
  });

  test("of a page that is not let in says so, and not that nobody answers", async () => {
    vi.stubGlobal("location", new URL("https://elsewhere.example"));
    const refusing = class {
      onerror: ((event: object) => void) | null = null;
      constructor() {
        setTimeout(() => this.onerror?.({}));
      }
      close() {}
    };
    const fetching = (() => Promise.reject(new TypeError("Failed to fetch"))) as unknown as typeof fetch;
    const WebSocket = refusing as never;
    try {
      const client = new Gateway(live.url, { token, fetch: fetching, WebSocket });
      using demo = client.tenant("demo");
      for (const asked of [() => client.tenants(), () => demo.ping()])
        await expect(asked()).rejects.toMatchObject({
          code: "forbidden",
          message: expect.stringContaining("pages of https://elsewhere.example in"),
        });
      const dead = new Gateway("http://127.0.0.1:1", { token, fetch: fetching, WebSocket });
      await expect(dead.tenants()).rejects.toMatchObject({ name: "Disconnected" });
    } finally {
      vi.unstubAllGlobals();
    }
  });
});
