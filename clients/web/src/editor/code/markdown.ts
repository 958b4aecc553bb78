/**
 * Renders Markdown as a tree of elements, without HTML, so that nothing in a file can run. Hostile files can be costly to
 * parse: the parser is bounded, and works in slices.
 */

import { markdownLanguage } from "@codemirror/lang-markdown";
import type { SyntaxNode, Tree } from "@lezer/common";
import type { MarkdownConfig, MarkdownParser } from "@lezer/markdown";
import { type ComponentChild, h } from "preact";

/** Characters; the rest of a longer text is not shown. */
const LONGEST = 400_000;
/** Characters of a paragraph, heading or cell: beyond that, the time to parse can grow quadratically. */
const INLINE = 5000;
/** Nested blocks, of which each level of a list is two; and nested elements. */
const DEPTH = 100;
/** Elements of a page; the text after them is shown unformatted. */
const ELEMENTS = 10_000;
/** Milliseconds for which the parser blocks the page at a time, and for which it runs in all. */
const SLICE = 10;
const PATIENCE = 1000;

/** Makes a Markdown parser treat what would be too costly as plain text. */
export const bounded: MarkdownConfig = {
  parseInline: [
    {
      name: "Long",
      before: "Escape",
      parse: (context, _next, at) => (at === context.offset && context.end - at > INLINE ? context.end : -1),
    },
  ],
  parseBlock: [
    {
      name: "Bounds",
      before: "LinkReference",
      parse(context, line) {
        if (context.depth < DEPTH) return false;
        const end = context.lineStart + line.text.length;
        context.addElement(context.elt("Paragraph", context.lineStart + line.pos, end));
        context.nextLine();
        return true;
      },
      // a link definition's title can go on for ever, and is parsed again at each line
      leaf: (_context, { content }) =>
        content.startsWith("[")
          ? {
              nextLine(context, _line, leaf) {
                if (leaf.content.length <= INLINE) return false;
                context.addLeafElement(
                  leaf,
                  context.elt("Paragraph", leaf.start, leaf.start + leaf.content.length),
                );
                return true;
              },
              finish: () => false,
            }
          : null,
    },
  ],
};

const parser = (markdownLanguage.parser as MarkdownParser).configure(bounded);

const BLOCKS: Readonly<Record<string, string>> = {
  Paragraph: "p",
  Blockquote: "blockquote",
  BulletList: "ul",
  OrderedList: "ol",
  ListItem: "li",
  Emphasis: "em",
  StrongEmphasis: "strong",
  Strikethrough: "s",
  Table: "table",
  TableHeader: "tr",
  TableRow: "tr",
};

/** Parts of the notation itself. */
const MARKS = /^(.*Mark|TableDelimiter|LinkLabel|URL|LinkTitle|CodeInfo)$/;

/** Renders a text, without a pause if it is an ordinary one. What would take too long follows unformatted. */
export async function rendered(text: string): Promise<ComponentChild> {
  const source = text.slice(0, LONGEST).replace(/^---\n[\s\S]*?\n---\n/, "");
  const tree = await parsed(source);
  const { length } = tree;
  const page = children(tree.topNode, { source, depth: 0, left: ELEMENTS });
  const rest = source.slice(length).trim() === "" ? null : h("pre", {}, source.slice(length));
  return h("article", { class: "markdown" }, page, rest);
}

async function parsed(source: string): Promise<Tree> {
  const parse = parser.startParse(source);
  let worked = 0;
  for (;;) {
    const began = performance.now();
    do {
      const tree = parse.advance();
      if (tree !== null) return tree;
    } while (performance.now() - began < SLICE);
    worked += performance.now() - began;
    if (worked > PATIENCE && parse.stoppedAt === null) parse.stopAt(parse.parsedPos);
    await new Promise((resolve) => setTimeout(resolve, 0));
  }
}

/** A long word: browsers break it into lines in quadratic time. */
const UNBROKEN = /\S{300}/;

/** Returns text that wraps, unless wrapping would be too costly. */
function words(text: string): ComponentChild {
  return text.length > INLINE || UNBROKEN.test(text) ? h("span", { class: "long" }, text) : text;
}

/** The state of rendering: the text, the depth of the present element, and how many more elements may follow. */
interface Page {
  readonly source: string;
  depth: number;
  left: number;
}

/** Returns what is in a node: its children, and the text between them. */
function children(node: SyntaxNode, page: Page): ComponentChild[] {
  if (page.depth >= DEPTH) return [words(page.source.slice(node.from, node.to))];
  page.depth += 1;
  const inside: ComponentChild[] = [];
  let at = node.from;
  for (let child = node.firstChild; child !== null && page.left > 0; child = child.nextSibling) {
    page.left -= 1;
    if (child.from > at) inside.push(between(node, page.source.slice(at, child.from)));
    if (!MARKS.test(child.name)) inside.push(element(child, page));
    at = child.to;
  }
  if (at < node.to) inside.push(between(node, page.source.slice(at, node.to)));
  page.depth -= 1;
  return inside;
}

/** Text between blocks is only space. */
function between(node: SyntaxNode, text: string): ComponentChild {
  return /^(Document|.*List|ListItem|Blockquote|Table.*)$/.test(node.name) && text.trim() === ""
    ? null
    : words(text);
}

function element(node: SyntaxNode, page: Page): ComponentChild {
  const { name } = node;
  const text = page.source.slice(node.from, node.to);
  const heading = /^(?:ATX|Setext)Heading([1-6])$/.exec(name);
  if (heading !== null) return h(`h${heading[1]}`, {}, trimmed(children(node, page)));
  const block = BLOCKS[name];
  if (block !== undefined) return h(block, {}, children(node, page));
  switch (name) {
    case "TableCell":
      return h(node.parent?.name === "TableHeader" ? "th" : "td", {}, children(node, page));
    case "InlineCode":
      return h("code", {}, words(text.replace(/^`+ ?| ?`+$/g, "")));
    case "FencedCode":
    case "CodeBlock":
      return h("pre", {}, h("code", {}, code(node, page)));
    case "HorizontalRule":
      return h("hr", {});
    case "HardBreak":
      return h("br", {});
    case "Escape":
      return text.slice(1);
    case "Task":
      return children(node, page);
    case "TaskMarker":
      return h("input", { type: "checkbox", disabled: true, checked: /x/i.test(text), "aria-label": "done" });
    case "Link":
    case "Autolink":
      return link(node, page);
    case "Image":
      return h("span", { class: "where" }, words(`[${text.replace(/^!\[|\].*$/gs, "")}]`));
    case "HTMLBlock":
    case "HTMLTag":
    case "Comment":
    case "CommentBlock":
    case "LinkReference":
      return null; // what is HTML is not shown
    default:
      return node.firstChild === null ? words(text) : children(node, page);
  }
}

function code(node: SyntaxNode, page: Page): string {
  const parts = node.getChildren("CodeText");
  return parts.map(({ from, to }) => page.source.slice(from, to)).join(node.name === "CodeBlock" ? "\n" : "");
}

/** Only the web is linked to; the rest is shown as text. */
function link(node: SyntaxNode, page: Page): ComponentChild {
  const found = node.getChild("URL");
  const address = found === null ? "" : page.source.slice(found.from, found.to);
  const inside = node.name === "Autolink" ? [words(address)] : children(node, page);
  if (!/^https?:\/\//i.test(address)) return h("span", {}, inside);
  return h("a", { href: address, target: "_blank", rel: "noreferrer" }, inside);
}

function trimmed(inside: ComponentChild[]): ComponentChild[] {
  return inside.map((child) => (typeof child === "string" ? child.replace(/^\s+|\n.*$/g, "") : child));
}
