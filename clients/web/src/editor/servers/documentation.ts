/** What a server tells of code, as a part of the page: Markdown, of which HTML is not shown. */

import { h, render } from "preact";
import type * as lsp from "vscode-languageserver-protocol";
import { rendered } from "../code/markdown.js";

/** Characters that are shown; more would hold up who reads. */
const LENGTH_MAX = 20_000;

export function documentation(text: string): HTMLElement {
  const element = document.createElement("div");
  element.className = "told-of-code";
  render(h("div", {}, rendered(text.slice(0, LENGTH_MAX))), element);
  return element;
}

/** Returns the Markdown of a hover's contents, of all their forms. */
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

/** Leaves text alone of HTML: what is returned has no tag in it, whatever came. */
const rules: Policy = {
  createHTML: (html) => html.replace(/<[^>]*>/g, "").replaceAll("<", "&lt;"),
};
const policy =
  typeof trustedTypes === "undefined" ? rules : trustedTypes.createPolicy("language-server", rules);

/** Makes text of the HTML that lsp-client makes of a signature's documentation. */
export function plain(html: string): string {
  return policy.createHTML(html);
}
