/** The preview's history, and what its page reports. The page is the tenant's: hostile. */

/** Addresses, and the index of the shown one. */
export interface Visited {
  readonly entries: readonly string[];
  readonly at: number;
}

export const NOWHERE: Visited = { entries: [], at: -1 };

const [ENTRIES, LINES, WORDS] = [50, 100, 2000];

export function here({ entries, at }: Visited): string | null {
  return entries[at] ?? null;
}

/** Adds an address after the shown one, as a browser does. */
export function visit(visited: Visited, url: string): Visited {
  if (here(visited) === url) return visited;
  const entries = [...visited.entries.slice(0, visited.at + 1), url].slice(-ENTRIES);
  return { entries, at: entries.length - 1 };
}

/** Goes back or forward, if possible. */
export function step({ entries, at }: Visited, by: number): Visited {
  return { entries, at: Math.max(0, Math.min(entries.length - 1, at + by)) };
}

const KINDS = ["page", "title", "moved", "going", "error", "warning"] as const;

export interface Report {
  readonly kind: (typeof KINDS)[number];
  readonly text: string;
  readonly url: string;
}

/** Returns a report of the script in a page of the origin `site`; null for anything else. */
export function reported(data: unknown, site: string): Report | null {
  if (typeof data !== "object" || data === null) return null;
  const { gatewayPreview, text, url } = data as Readonly<Record<string, unknown>>;
  const kind = KINDS.find((one) => one === gatewayPreview);
  if (kind === undefined || typeof text !== "string" || typeof url !== "string") return null;
  if (text.length > WORDS || !within(kind === "going" ? text : url, site)) return null;
  return { kind, text: printable(text), url: plain(url) };
}

function within(url: string, site: string): boolean {
  return url.length <= WORDS && URL.canParse(url) && new URL(url).origin === site;
}

/** Returns an address without the gateway's parameter. */
function plain(url: string): string {
  return url.replace(/([?&])__gateway_preview=[^&#]*(&?)/, (_, before, after) => (after ? before : ""));
}

/** Returns text without characters that reorder or hide other text. */
function printable(text: string): string {
  return text.replace(/(?!\n)[\p{Cc}\p{Bidi_Control}]/gu, " ");
}

/** Milliseconds after a page has loaded for its script to report. */
const SILENCE = 700;
/** Reports read from one page; any more are ignored. */
const HEARD = 500;

/** Tells which pages of a frame came without the script, from what the others report and from the frame's loads. */
export class Pages {
  #count = 0;
  /** Whether the page that loads now has the script. */
  #reports = false;
  /** Whether the last page that reports has loaded, by its own account. */
  #complete = false;
  /** Where a link of that page leads. */
  #going: string | null = null;
  #loads = 0;

  /** Returns whether to show this report. */
  hear({ kind, text }: Report): boolean {
    if (++this.#count > HEARD) return false;
    if (kind === "page") [this.#reports, this.#complete, this.#going] = [true, false, null];
    if (kind === "title") this.#complete = true;
    if (kind === "going") this.#going = text;
    return kind !== "going";
  }

  /**
   * Call this when the frame has loaded a page. Returns "silent" for a page without the script; if a link led to it, its
   * address instead, to load it again with the script. Of loads in quick succession only the last is judged.
   */
  async loaded(): Promise<"reports" | "silent" | URL> {
    const load = ++this.#loads;
    const reported = this.#reports;
    [this.#count, this.#reports] = [0, false];
    if (reported && this.#going === null) return "reports";
    await new Promise((resolve) => setTimeout(resolve, SILENCE));
    if (this.#reports || load !== this.#loads) return "reports";
    // it was this page that loaded, and it starts a download, or the next one is still on its way
    if (reported && this.#complete) return "reports";
    const going = this.#going;
    this.#going = null;
    return going === null ? "silent" : new URL(going);
  }
}

export interface Line {
  readonly kind: "error" | "warning" | "note";
  readonly text: string;
  readonly times: number;
}

/** Adds a line; a repeated one is only counted. */
export function told(lines: readonly Line[], kind: Line["kind"], text: string): readonly Line[] {
  const last = lines.at(-1);
  if (last?.kind === kind && last.text === text)
    return [...lines.slice(0, -1), { ...last, times: last.times + 1 }];
  return [...lines, { kind, text, times: 1 }].slice(-LINES);
}
