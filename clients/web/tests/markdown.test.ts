import { render } from "preact";
import { expect, test } from "vitest";
import { rendered } from "../src/editor/code/markdown.js";

function page(text: string): HTMLElement {
  const host = document.createElement("div");
  render(rendered(text), host);
  return host;
}

test("markdown becomes a page", () => {
  const shown = page(
    "---\ntitle: x\n---\n# A *title*\n\nWords and `code`, [a link](https://example.com).\n\n- one\n- [x] two\n\n" +
      "| a | b |\n|---|---|\n| 1 | 2 |\n\n```js\nlet a = 1;\n```\n\n> said\n",
  );
  expect(shown.querySelector("h1")?.textContent).toBe("A title");
  expect(shown.querySelector("p code")?.textContent).toBe("code");
  expect(shown.querySelector("a")?.getAttribute("href")).toBe("https://example.com");
  expect([...shown.querySelectorAll("li")].map((item) => item.textContent?.trim())).toEqual(["one", "two"]);
  expect(
    shown.querySelector("li input")?.hasAttribute("checked") || shown.querySelector("input")?.checked,
  ).toBe(true);
  expect([...shown.querySelectorAll("td")].map((cell) => cell.textContent?.trim())).toEqual(["1", "2"]);
  expect(shown.querySelector("pre")?.textContent).toBe("let a = 1;");
  expect(shown.querySelector("blockquote")?.textContent?.trim()).toBe("said");
  expect(shown.textContent).not.toContain("title: x");
});

test("nothing of it runs, and nothing leads elsewhere than the web", () => {
  const shown = page(
    "<script>alert(1)</script>\n\n<img src=x onerror=alert(1)> [a](javascript:alert(1)) " +
      "[b](data:text/html,x) ![c](https://evil.example/pixel.png) <javascript:alert(1)>",
  );
  expect(shown.querySelectorAll("script, img, iframe, [onerror]")).toHaveLength(0);
  expect(shown.querySelectorAll("a")).toHaveLength(0);
});
