/** Markdown as a page: a tree of elements, made without HTML, so that nothing in a file can run. */

import { markdownLanguage } from "@codemirror/lang-markdown";
import type { SyntaxNode } from "@lezer/common";
import { type ComponentChild, h } from "preact";

/** A longer text is shown up to here. */
const LONGEST = 400_000;

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

export function rendered(text: string): ComponentChild {
  const source = text.slice(0, LONGEST).replace(/^---\n[\s\S]*?\n---\n/, "");
  const tree = markdownLanguage.parser.parse(source);
  return h("article", { class: "markdown" }, children(tree.topNode, source));
}

/** Returns what is in a node: its children, and the text between them. */
function children(node: SyntaxNode, source: string): ComponentChild[] {
  const inside: ComponentChild[] = [];
  let at = node.from;
  for (let child = node.firstChild; child !== null; child = child.nextSibling) {
    if (child.from > at) inside.push(between(node, source.slice(at, child.from)));
    if (!MARKS.test(child.name)) inside.push(element(child, source));
    at = child.to;
  }
  if (at < node.to) inside.push(between(node, source.slice(at, node.to)));
  return inside;
}

/** Text between blocks is only space. */
function between(node: SyntaxNode, text: string): ComponentChild {
  return /^(Document|.*List|ListItem|Blockquote|Table.*)$/.test(node.name) && text.trim() === ""
    ? null
    : text;
}

function element(node: SyntaxNode, source: string): ComponentChild {
  const { name } = node;
  const text = source.slice(node.from, node.to);
  const heading = /^(?:ATX|Setext)Heading([1-6])$/.exec(name);
  if (heading !== null) return h(`h${heading[1]}`, {}, trimmed(children(node, source)));
  const block = BLOCKS[name];
  if (block !== undefined) return h(block, {}, children(node, source));
  switch (name) {
    case "TableCell":
      return h(node.parent?.name === "TableHeader" ? "th" : "td", {}, children(node, source));
    case "InlineCode":
      return h("code", {}, text.replace(/^`+ ?| ?`+$/g, ""));
    case "FencedCode":
    case "CodeBlock":
      return h("pre", {}, h("code", {}, code(node, source)));
    case "HorizontalRule":
      return h("hr", {});
    case "HardBreak":
      return h("br", {});
    case "Escape":
      return text.slice(1);
    case "Task":
      return children(node, source);
    case "TaskMarker":
      return h("input", { type: "checkbox", disabled: true, checked: /x/i.test(text), "aria-label": "done" });
    case "Link":
    case "Autolink":
      return link(node, source);
    case "Image":
      return h("span", { class: "where" }, `[${text.replace(/^!\[|\].*$/gs, "")}]`);
    case "HTMLBlock":
    case "HTMLTag":
    case "Comment":
    case "CommentBlock":
    case "LinkReference":
      return null; // what is HTML is not shown
    default:
      return node.firstChild === null ? text : children(node, source);
  }
}

function code(node: SyntaxNode, source: string): string {
  const parts = node.getChildren("CodeText");
  return parts.map(({ from, to }) => source.slice(from, to)).join(node.name === "CodeBlock" ? "\n" : "");
}

/** Only the web is linked to; the rest is shown as text. */
function link(node: SyntaxNode, source: string): ComponentChild {
  const found = node.getChild("URL");
  const address = found === null ? "" : source.slice(found.from, found.to);
  const inside = node.name === "Autolink" ? [address] : children(node, source);
  if (!/^https?:\/\//i.test(address)) return h("span", {}, inside);
  return h("a", { href: address, target: "_blank", rel: "noreferrer" }, inside);
}

function trimmed(inside: ComponentChild[]): ComponentChild[] {
  return inside.map((child) => (typeof child === "string" ? child.replace(/^\s+|\n.*$/g, "") : child));
}
