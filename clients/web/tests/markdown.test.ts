import { ensureSyntaxTree } from "@codemirror/language";
import { EditorState } from "@codemirror/state";
import { render } from "preact";
import { expect, test } from "vitest";
import { supportOf } from "../src/editor/code/languages.js";
import { rendered } from "../src/editor/code/markdown.js";

async function page(text: string): Promise<HTMLElement> {
  const host = document.createElement("div");
  render(await rendered(text), host);
  return host;
}

test("markdown becomes a page", async () => {
  const shown = await page(
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

test("nothing of it runs, and nothing leads elsewhere than the web", async () => {
  const shown = await page(
    "<script>alert(1)</script>\n\n<img src=x onerror=alert(1)> [a](javascript:alert(1)) " +
      "[b](data:text/html,x) ![c](https://evil.example/pixel.png) <javascript:alert(1)>",
  );
  expect(shown.querySelectorAll("script, img, iframe, [onerror]")).toHaveLength(0);
  expect(shown.querySelectorAll("a")).toHaveLength(0);
});

const LINES = "x\n".repeat(40_000);

test.each([
  ["links without an end", "[a](".repeat(20_000)],
  ["links without an end in a heading", `# ${"[a](".repeat(20_000)}`],
  ["links without an end in a cell", `| a |\n|---|\n| ${"[a](".repeat(20_000)} |`],
  ["pictures without an end", "![a](".repeat(16_000)],
  ["emphasis without an end", "*a_ ".repeat(20_000)],
  ["deep quotes", "> ".repeat(40_000)],
  ["deep lists", `${"- ".repeat(20_000)}\n${"\n".repeat(20_000)}`],
  ["deep emphasis", `${"*a".repeat(1200)}${"*".repeat(1200)}`],
  ["a title without an end", `[a]: b "${LINES}`],
  ["many elements", "*a* ".repeat(1000).concat("\n\n").repeat(20)],
])("%s take no more than a moment, and nothing of them is lost", async (_name, text) => {
  const began = performance.now();
  const shown = await page(text);
  const state = EditorState.create({ doc: text, extensions: [await supportOf("a.md")] });
  expect(ensureSyntaxTree(state, text.length, 8000)?.length).toBe(text.length); // where one writes it, too
  const letters = (of: string) => of.replace(/[^ax]/g, "").length;
  expect(letters(shown.textContent ?? "")).toBe(letters(text));
  let depth = 0;
  for (
    let one = shown.querySelector("article");
    one !== null;
    one = one.lastElementChild as HTMLElement | null
  )
    depth++;
  expect(depth).toBeLessThan(250);
  expect(shown.querySelectorAll("*").length).toBeLessThan(11_000);
  expect(performance.now() - began).toBeLessThan(8000); // 37 s it was for the first
});
