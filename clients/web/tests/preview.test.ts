import { expect, test } from "vitest";
import { here, type Line, NOWHERE, reported, step, told, visit } from "../src/editor/state/preview.js";

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

test("lines are counted where they repeat, and are so many at most", () => {
  let lines: readonly Line[] = [];
  for (let count = 0; count < 3; count++) lines = told(lines, "error", "again");
  expect(lines).toEqual([{ kind: "error", text: "again", times: 3 }]);
  for (let count = 0; count < 500; count++) lines = told(lines, "warning", `${count}`);
  expect(lines).toHaveLength(100);
});
