import { readFileSync } from "node:fs";
import { describe, expect, test, vi } from "vitest";
import { here, type Line, NOWHERE, Pages, reported, step, told, visit } from "../src/editor/state/preview.js";

const SITE = "https://shop.example.com";

test("addresses are gone through as in a browser", () => {
  let visited = ["/", "/a", "/a", "/b"].reduce((before, path) => visit(before, SITE + path), NOWHERE);
  expect(visited.entries).toHaveLength(3);
  visited = step(visited, -1);
  expect(here(visited)).toBe(`${SITE}/a`);
  expect(here(step(visited, -9))).toBe(`${SITE}/`);
  expect(here(step(visited, 9))).toBe(`${SITE}/b`);
  visited = visit(visited, `${SITE}/c`);
  expect(visited.entries).toEqual([`${SITE}/`, `${SITE}/a`, `${SITE}/c`]);
  for (let count = 0; count < 200; count++) visited = visit(visited, `${SITE}/${count}`);
  expect(visited.entries.length).toBeLessThanOrEqual(50);
  expect(here(NOWHERE)).toBeNull();
});

test("a page of the site reports what it is at, and its errors as text", () => {
  const url = `${SITE}/a?b=1&__gateway_preview=1.k.s`;
  expect(reported({ gatewayPreview: "page", text: "", url }, SITE)).toEqual({
    kind: "page",
    text: "",
    url: `${SITE}/a?b=1`,
  });
  expect(reported({ gatewayPreview: "error", text: "a\u202eb\u0000c\nd", url }, SITE)?.text).toBe("a b c\nd");
});

test.each([
  null,
  "page",
  {},
  { gatewayPreview: "other", text: "", url: `${SITE}/` },
  { gatewayPreview: "page", text: "", url: "https://evil.example/" },
  { gatewayPreview: "page", text: "", url: "javascript:alert(1)" },
  { gatewayPreview: "page", text: "", url: `${SITE}.evil.example/` },
  { gatewayPreview: "going", text: "https://evil.example/", url: `${SITE}/` },
  { gatewayPreview: "error", text: ["x"], url: `${SITE}/` },
  { gatewayPreview: "error", text: "x".repeat(2001), url: `${SITE}/` },
  { gatewayPreview: "error", text: "x", url: `${SITE}/${"x".repeat(2000)}` },
])("nothing else is heard: %j", (data) => {
  expect(reported(data, SITE)).toBeNull();
});

const SECOND = `${SITE}/second`;
const load = (pages: Pages) => pages.loaded();
const report = (kind: "page" | "title" | "going" | "error") => (pages: Pages) => {
  pages.hear({ kind, text: kind === "going" ? SECOND : "", url: `${SITE}/` });
};
const [page, title, going, error] = [report("page"), report("title"), report("going"), report("error")];
const late = () => vi.advanceTimersByTimeAsync(600);
const later = () => vi.advanceTimersByTimeAsync(800);

test.each([
  ["one that reports", [page, load], ["reports"]],
  ["one that reports late", [load, late, page], ["reports"]],
  ["one without the script", [load], ["silent"]],
  ["one that a link leads to", [page, load, going, late, load], ["reports", SECOND]],
  ["a link followed before its page had loaded", [page, going, load], [SECOND]],
  ["a link followed as its page was loaded", [page, title, going, load, late, load], ["reports", SECOND]],
  ["such a link to a slow page", [page, going, load, title, later, load], ["reports", SECOND]],
  ["one that starts a download", [page, going, title, load], ["reports"]],
  [
    "one after a link to a page without the script",
    [page, load, going, load, later, load],
    ["reports", SECOND, "silent"],
  ],
  ["an early link of the second page", [page, title, load, page, going, load], ["reports", SECOND]],
  [
    "a link's page that reports",
    [page, load, going, load, late, page, load],
    ["reports", "reports", "reports"],
  ],
  [
    "a link that leads nowhere",
    [page, load, going, page, load, error, load],
    ["reports", "reports", "silent"],
  ],
])("each page that loads is known: %s", async (_, happens, known) => {
  vi.useFakeTimers();
  const pages = new Pages();
  const loads: Promise<unknown>[] = [];
  for (const happen of happens) {
    const done: unknown = happen(pages);
    if (happen === load) loads.push(done as Promise<unknown>);
    else await done;
  }
  await vi.advanceTimersByTimeAsync(2000);
  expect((await Promise.all(loads)).map(String)).toEqual(known);
  vi.useRealTimers();
});

test("so many reports of one page are shown at most", () => {
  const pages = new Pages();
  const told = Array.from({ length: 1000 }, () => pages.hear({ kind: "error", text: "", url: SITE }));
  expect(told.filter(Boolean)).toHaveLength(500);
});

test("lines are counted where they repeat, and are so many at most", () => {
  let lines: readonly Line[] = [];
  for (let count = 0; count < 3; count++) lines = told(lines, "error", "again");
  expect(lines).toEqual([{ kind: "error", text: "again", times: 3 }]);
  for (let count = 0; count < 500; count++) lines = told(lines, "warning", `${count}`);
  expect(lines).toHaveLength(100);
});

describe("the script in a page", () => {
  const source = readFileSync(`${import.meta.dirname}/../../../gateway/api/preview.js`, "utf8");

  /** Runs it as in a frame, and returns what it reports. */
  function inserted(storage: () => unknown = () => ({})) {
    const told: string[][] = [];
    const said = { error: () => {}, warn: () => {} };
    const page = {
      parent: {
        postMessage: (report: { gatewayPreview: string; text: string }) =>
          told.push([report.gatewayPreview, report.text]),
      },
      get localStorage() {
        return storage();
      },
    };
    const moves = { state: null, replaceState: () => {}, pushState: () => {} };
    const names = ["window", "console", "history", "addEventListener", "EDITOR"];
    new Function(...names, source)(page, said, moves, () => {}, "http://gateway.localhost");
    return { told, said: said as unknown as Console };
  }

  test.each([
    [["%s is not a %s", "div", "p", "more"], "div is not a p more"],
    [["%d of %i, %o%%", 1.9, "2", { a: 1 }], '1 of 2, {"a":1}%'],
    [["%cred %s %s", "color: red", "once"], "red once %s"],
    [["100%", 5], "100% 5"],
    [[{ a: 1 }, "%s"], '{"a":1} %s'],
  ])("tells %j as a console does", (values, expected) => {
    const { told, said } = inserted();
    said.error(...values);
    expect(told.at(-1)).toEqual(["error", expected]);
  });

  test("breaks no page whose values have no text", () => {
    const { told, said } = inserted();
    const loop: Record<string, unknown> = Object.create(null);
    loop.self = loop;
    for (const values of [["%d", Symbol("x")], [loop]]) said.error(...values);
    said.error("later");
    expect(told.at(-1)).toEqual(["error", "later"]);
  });

  test("says why storage is refused", () => {
    expect(inserted().told).toEqual([["page", ""]]);
    const refuse = () => {
      throw new DOMException("denied", "SecurityError");
    };
    expect(inserted(refuse).told[1]).toEqual(["warning", expect.stringContaining("Open it in a new tab")]);
  });
});
