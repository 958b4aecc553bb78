/** Renders a server's documentation: Markdown, without HTML. */

import { h, render } from "preact";
import type * as lsp from "vscode-languageserver-protocol";
import { rendered } from "../code/markdown.js";

/** Characters shown at most; more would slow down the page. */
const LENGTH_MAX = 20_000;

export function documentation(text: string): HTMLElement {
  const element = document.createElement("div");
  element.className = "told-of-code";
  void rendered(text.slice(0, LENGTH_MAX)).then((page) => render(h("div", {}, page), element));
  return element;
}

/** Returns a hover's contents, in any of their forms, as Markdown. */
export function markdownOf(contents: lsp.Hover["contents"]): string {
  if (Array.isArray(contents)) return contents.map(markdownOf).join("\n\n");
  if (typeof contents === "string") return contents;
  if ("language" in contents) return `\`\`\`${contents.language}\n${contents.value}\n\`\`\``;
  return contents.kind === "markdown" ? contents.value : `\`\`\`\n${contents.value}\n\`\`\``;
}

interface Policy {
  createHTML(html: string): string;
}

declare const trustedTypes: { createPolicy(name: string, rules: Policy): Policy } | undefined;

/** Reduces HTML to its text. The result contains no tags, whatever the input. */
const rules: Policy = {
  createHTML: (html) => html.replace(/<[^>]*>/g, "").replaceAll("<", "&lt;"),
};
const policy =
  typeof trustedTypes === "undefined" ? rules : trustedTypes.createPolicy("language-server", rules);

/** Reduces the HTML that lsp-client makes of a signature's documentation to text. */
export function plain(html: string): string {
  return policy.createHTML(html);
}
