/** One xterm.js screen, in the page's colours and within its content security policy. */

import type { Size } from "@incus-gateway/client";
import { FitAddon } from "@xterm/addon-fit";
import { SearchAddon } from "@xterm/addon-search";
import { Unicode11Addon } from "@xterm/addon-unicode11";
import { WebLinksAddon } from "@xterm/addon-web-links";
import { Terminal as Xterm } from "@xterm/xterm";
import { nonce } from "../code/theme.js";

export class Screen {
  readonly #xterm: Xterm;
  readonly #fit = new FitAddon();
  readonly #search = new SearchAddon();
  readonly element: HTMLDivElement;
  onInput: (data: string | Uint8Array) => void = () => {};
  onResize: (size: Size) => void = () => {};
  onFocus: () => void = () => {};

  /** `plain` output is no terminal's: its lines end without a carriage return. */
  constructor(readOnly: boolean, plain: boolean) {
    this.element = document.createElement("div");
    this.element.className = "screen";
    this.element.addEventListener("focusin", () => this.onFocus());
    this.#xterm = new Xterm({
      allowProposedApi: true, // for widths by Unicode 11
      convertEol: plain,
      cursorBlink: !matchMedia("(prefers-reduced-motion: reduce)").matches,
      cursorStyle: "bar",
      cursorInactiveStyle: "outline",
      disableStdin: readOnly,
      fontFamily: getComputedStyle(document.documentElement).getPropertyValue("--mono"),
      fontSize: 12.5,
      lineHeight: 1.25,
      minimumContrastRatio: 4.5,
      scrollback: 10_000,
      screenReaderMode: false,
      theme: colours(),
    });
    this.#xterm.loadAddon(this.#fit);
    this.#xterm.loadAddon(this.#search);
    this.#xterm.loadAddon(new Unicode11Addon());
    this.#xterm.unicode.activeVersion = "11"; // an emoji takes two cells, as programs reckon
    this.#xterm.loadAddon(
      new WebLinksAddon((_event, address) => open(address, "_blank", "noopener,noreferrer")),
    );
    this.#xterm.attachCustomKeyEventHandler((event) => this.#key(event));
    this.#xterm.onData((data) => this.onInput(data));
    this.#xterm.onBinary((data) => this.onInput(Uint8Array.from(data, (char) => char.charCodeAt(0))));
    this.#xterm.onResize((size) => this.onResize({ cols: size.cols, rows: size.rows }));
  }

  /** Takes Ctrl-Shift-C and -V, which a terminal has for copy and paste; returns whether a key is the program's. */
  #key(event: KeyboardEvent): boolean {
    if (!event.ctrlKey || !event.shiftKey || event.altKey) return true;
    // the browser pastes by itself
    if (event.code === "KeyV") return false;
    if (event.code !== "KeyC") return true;
    event.preventDefault();
    if (event.type === "keydown") void this.copy();
    return false;
  }

  /** Copies what is selected; returns whether anything is. */
  async copy(): Promise<boolean> {
    const text = this.#xterm.getSelection();
    if (text === "") return false;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // over plain HTTP there is no clipboard; xterm.js answers this where it has the focus
      this.#xterm.focus();
      document.execCommand("copy");
    }
    return true;
  }

  /** Selects the next, or the previous, place where a text stands; returns whether there is one. */
  find(text: string, back: boolean): boolean {
    if (text === "") return false;
    return back ? this.#search.findPrevious(text) : this.#search.findNext(text);
  }

  /** Draws in `element`, which must be in the page by now. */
  open(): void {
    if (this.#xterm.element === undefined) styled(() => this.#xterm.open(this.element));
    this.fit();
  }

  get size(): Size {
    return { cols: this.#xterm.cols, rows: this.#xterm.rows };
  }

  fit(): void {
    if (this.element.clientWidth > 20 && this.element.clientHeight > 20) this.#fit.fit();
  }

  /** Returns once it is drawn, so that output does not pile up here. */
  write(data: Uint8Array): Promise<void> {
    return new Promise((resolve) => this.#xterm.write(data, resolve));
  }

  note(text: string): void {
    this.#xterm.write(`\r\n\x1b[0;2m── ${text}\x1b[0m\r\n`);
  }

  recolour(): void {
    this.#xterm.options.theme = colours();
  }

  focus(): void {
    this.#xterm.focus();
  }

  /** What is on the screen, as text. */
  get text(): string {
    const buffer = this.#xterm.buffer.active;
    return Array.from({ length: this.#xterm.rows }, (_, row) =>
      buffer.getLine(buffer.viewportY + row)?.translateToString(true),
    ).join("\n");
  }

  dispose(): void {
    this.#xterm.dispose();
    this.element.remove();
  }
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name: string) => style.getPropertyValue(name).trim();
  const names = ["black", "red", "green", "yellow", "blue", "magenta", "cyan", "white"];
  const plain = Object.fromEntries(names.map((name) => [name, of(`--t-${name}`)]));
  const bright = Object.fromEntries(
    names.map((name) => [`bright${name[0]?.toUpperCase()}${name.slice(1)}`, of(`--t-bright-${name}`)]),
  );
  return {
    background: of("--terminal"),
    foreground: of("--text"),
    cursor: of("--accent"),
    cursorAccent: of("--terminal"),
    selectionBackground: of("--selection"),
    scrollbarSliderBackground: of("--scrollbar"),
    scrollbarSliderHoverBackground: of("--scrollbar-hover"),
    scrollbarSliderActiveBackground: of("--scrollbar-hover"),
    ...plain,
    ...bright,
  };
}

// xterm.js writes colours by `setAttribute("style", …)`, which no nonce allows; the same by `cssText` is a script's
// own right. All that it writes so are spans.
HTMLSpanElement.prototype.setAttribute = function (this: HTMLSpanElement, name: string, value: string): void {
  if (name === "style") this.style.cssText = value;
  else Element.prototype.setAttribute.call(this, name, value);
};

/** Does something that makes style elements, and gives these the nonce that lets them into the page. */
function styled(work: () => void): void {
  document.createElement = ((tag: string, options?: ElementCreationOptions) => {
    const element = Document.prototype.createElement.call(document, tag, options);
    if (element instanceof HTMLStyleElement) element.nonce = nonce();
    return element;
  }) as typeof document.createElement;
  try {
    work();
  } finally {
    Reflect.deleteProperty(document, "createElement"); // the prototype's shows again
  }
}
