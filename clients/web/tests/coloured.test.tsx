import { render } from "preact";
import { expect, test } from "vitest";
import { Coloured, plain } from "../src/editor/ui/parts.js";

/** Returns the parts of a shown text that have a look, each with its classes. */
function shown(text: string): { all: string; parts: string[] } {
  const host = document.createElement("div");
  render(<Coloured text={text} />, host);
  const parts = [...host.querySelectorAll("span")].filter(({ className }) => className !== "");
  return {
    all: host.textContent ?? "",
    parts: parts.map((part) => `${part.textContent}: ${part.className}`),
  };
}

test.each([
  ["no colour", "no colour", []],
  ["\x1b[32m➜\x1b[39m  \x1b[1mLocal\x1b[22m: x", "➜  Local: x", ["➜: ansi-green", "Local:  bold"]],
  ["\x1b[38;5;240mgrey\x1b[0m \x1b[38;5;196mred\x1b[m y", "grey red y", ["grey: ansi-grey", "red: ansi-red"]],
  ["\x1b[38;2;20;20;250mblue \x1b[48;5;1mstill", "blue still", ["blue : ansi-blue", "still: ansi-blue"]],
  ["\x1b[2mfaint\x1b[22m \x1b[1;93mtwo", "faint two", ["faint: ansi-grey", "two: ansi-yellow bold"]],
  ["\x1b]8;;http://x\x07link\x1b]8;;\x1b\\ \x1b[2K\x1b[1Gend \x1b[?25h", "link end ", []],
  ["\x1b[31mred\x1b(B\x1b[m plain", "red plain", ["red: ansi-red"]], // as tput ends it
  ["\x1b7\x1b[>4;2mplain\x1b8 \x1bPq#0\x1b\\text", "plain text", []],
  ["[38;5;240m is text", "[38;5;240m is text", []],
])("%j is shown as a terminal shows it", (text, all, parts) => {
  expect(shown(text)).toEqual({ all, parts });
  expect(plain(text)).toBe(all);
});

test("a line of colours alone has no more parts than one can see", () => {
  const { all, parts } = shown("\x1b[31mx".repeat(20_000));
  expect(all).toBe("x".repeat(20_000));
  expect(parts.length).toBeLessThanOrEqual(200);
});
