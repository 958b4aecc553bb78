import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { load, missing, request } from "../src/editor/state/network.js";

const asked = vi.fn<typeof fetch>();

beforeEach(() => {
  vi.useFakeTimers();
  vi.stubGlobal("fetch", asked.mockReset());
  missing.value = false;
});
afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

const changed = () => Promise.reject(new TypeError("Failed to fetch"));
const answer = () =>
  Promise.resolve(new Response("[1]", { headers: { "Content-Type": "application/json" } }));

/** Lets all pauses go by, and returns what became of the work. */
async function after<Result>(work: Promise<Result>): Promise<Result | Error> {
  const told = work.catch((error: Error) => error);
  await vi.runAllTimersAsync();
  return told;
}

test("what only reads is asked again until the network is there", async () => {
  asked.mockImplementationOnce(changed).mockImplementationOnce(changed).mockImplementationOnce(answer);
  const got = (await after(request("/v1/session"))) as Response;
  expect(await got.json()).toEqual([1]);
  expect(asked).toHaveBeenCalledTimes(3);
});

test("what only reads is given up after some seconds, with what the network said", async () => {
  asked.mockImplementation(changed);
  const begun = Date.now();
  expect(await after(request("/v1/session", { method: "GET" }))).toBeInstanceOf(TypeError);
  expect(asked).toHaveBeenCalledTimes(5);
  expect(Date.now() - begun).toBeLessThan(5000);
});

test.each(["POST", "PUT", "PATCH", "DELETE"])(
  "%s may have had its effect, and is sent once",
  async (method) => {
    asked.mockImplementation(changed);
    expect(await after(request("/v1/session", { method }))).toBeInstanceOf(TypeError);
    expect(asked).toHaveBeenCalledTimes(1);
  },
);

test("a refusal is an answer", async () => {
  asked.mockImplementation(async () => new Response("no", { status: 503 }));
  expect(((await after(request("/v1/session"))) as Response).status).toBe(503);
  expect(asked).toHaveBeenCalledTimes(1);
});

test("who gave up is not asked for again", async () => {
  const ending = new AbortController();
  asked.mockImplementation(() => {
    ending.abort();
    return changed();
  });
  await after(request("/v1/session", { signal: ending.signal }));
  expect(asked).toHaveBeenCalledTimes(1);
});

test("an answer that breaks off is asked for again", async () => {
  asked.mockImplementationOnce(async () => {
    const broken = new ReadableStream({
      pull: (controller) => controller.error(new TypeError("network error")),
    });
    return new Response(broken, { headers: { "Content-Type": "application/json" } });
  });
  asked.mockImplementationOnce(answer);
  const got = (await after(request("/v1/session"))) as Response;
  expect(await got.json()).toEqual([1]);
});

test("what is downloaded is not kept in memory", async () => {
  const endless = new ReadableStream({ pull: (controller) => controller.enqueue(new Uint8Array([1])) });
  asked.mockImplementation(async () => new Response(endless, { headers: { "Content-Type": "text/plain" } }));
  const got = (await after(request("/v1/tenants/shop/archive"))) as Response;
  expect((await got.body?.getReader().read())?.value).toEqual(new Uint8Array([1]));
});

test("code that did not load is loaded again, and missing once that has failed for some seconds", async () => {
  const part = vi.fn<() => Promise<string>>().mockImplementationOnce(changed).mockResolvedValue("code");
  expect(await after(load(part))).toBe("code");
  expect(missing.value).toBe(false);
  const gone = vi.fn<() => Promise<string>>().mockImplementation(changed);
  expect(await after(load(gone))).toEqual(new Error("A part of the editor did not load."));
  expect(missing.value).toBe(true);
  expect(gone).toHaveBeenCalledTimes(5);
});
