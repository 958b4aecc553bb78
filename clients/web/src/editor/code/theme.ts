/** The code theme. All colours are the page's CSS variables, so light and dark need no second theme. */

import { HighlightStyle, syntaxHighlighting } from "@codemirror/language";
import { EditorView } from "@codemirror/view";
import { tags as t } from "@lezer/highlight";

const look = EditorView.theme({
  "&": {
    height: "100%",
    fontSize: "var(--code-size, 13px)",
    backgroundColor: "var(--surface)",
    color: "var(--text)",
  },
  "&.cm-focused": { outline: "none" },
  ".cm-scroller": { fontFamily: "var(--mono)", lineHeight: "1.6", fontVariantLigatures: "none" },
  ".cm-content": { padding: "8px 0 40vh", caretColor: "var(--accent)" },
  ".cm-line": { padding: "0 16px 0 8px" },
  ".cm-cursor, .cm-dropCursor": { borderLeftColor: "var(--accent)", borderLeftWidth: "2px" },
  "&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground": {
    background: "var(--selection)",
  },
  ".cm-gutters": {
    backgroundColor: "var(--surface)",
    color: "var(--text-faint)",
    border: "none",
    paddingLeft: "8px",
  },
  ".cm-lineNumbers .cm-gutterElement": { minWidth: "3ch", padding: "0 10px 0 4px" },
  ".cm-foldGutter .cm-gutterElement": { padding: "0 4px 0 0", color: "var(--text-faint)" },
  ".cm-theirs-gutter": { width: "3px" },
  ".cm-theirs": { backgroundColor: "var(--agent)" },
  ".cm-activeLine": { backgroundColor: "var(--line-active)" },
  ".cm-activeLineGutter": { backgroundColor: "transparent", color: "var(--text)" },
  ".cm-matchingBracket, &.cm-focused .cm-matchingBracket": {
    backgroundColor: "var(--accent-soft)",
    outline: "1px solid var(--accent-line)",
  },
  ".cm-selectionMatch": { backgroundColor: "var(--match)" },
  ".cm-searchMatch": { backgroundColor: "var(--match)", outline: "1px solid var(--match-line)" },
  ".cm-searchMatch-selected": { backgroundColor: "var(--match-strong)" },
  ".cm-foldPlaceholder": {
    background: "var(--raised)",
    border: "1px solid var(--edge)",
    color: "var(--text-soft)",
    padding: "0 6px",
  },
  ".cm-specialChar": { color: "var(--bad)" },
  ".cm-panels": { backgroundColor: "var(--raised)", color: "var(--text)", borderColor: "var(--edge)" },
  ".cm-textfield": { backgroundColor: "var(--surface)", color: "var(--text)", fontSize: "inherit" },
  ".cm-panels.cm-panels-top": { borderBottom: "1px solid var(--edge)" },
  ".cm-tooltip": {
    background: "var(--raised)",
    border: "1px solid var(--edge)",
    borderRadius: "7px",
    boxShadow: "var(--shadow)",
    overflow: "hidden",
  },
  ".cm-tooltip.cm-tooltip-autocomplete > ul": {
    fontFamily: "var(--mono)",
    fontSize: "12.5px",
    maxHeight: "16em",
  },
  ".cm-tooltip.cm-tooltip-autocomplete > ul > li": { padding: "3px 10px", color: "var(--text)" },
  ".cm-tooltip.cm-tooltip-autocomplete > ul > li[aria-selected]": {
    background: "var(--accent-soft)",
    color: "var(--text)",
  },
  ".cm-arrived": { animation: "arrived 2.4s ease-out" },
  ".cm-changedLine": { backgroundColor: "var(--diff-line) !important" },
  ".cm-changedText": { background: "var(--diff-text) !important" },
  // faint colours, such as that of comments, cannot be read on that
  ".cm-changedText, .cm-changedText *": { color: "var(--text)" },
  ".cm-deletedChunk": { backgroundColor: "var(--diff-gone)" },
  ".cm-collapsedLines": {
    background: "var(--raised) !important",
    color: "var(--text-soft)",
    fontFamily: "var(--sans)",
    fontSize: "12px",
  },
  ".cm-collapsedLines::before, .cm-collapsedLines::after": { content: '"···" !important' },
  ".cm-changeGutter": { width: "3px", paddingLeft: "1px" },
});

const colours = HighlightStyle.define([
  {
    tag: [t.keyword, t.operatorKeyword, t.modifier, t.controlKeyword, t.definitionKeyword],
    color: "var(--c-keyword)",
  },
  { tag: [t.string, t.special(t.string), t.regexp, t.attributeValue], color: "var(--c-string)" },
  { tag: [t.number, t.bool, t.null, t.atom, t.unit, t.color], color: "var(--c-number)" },
  { tag: [t.comment, t.meta], color: "var(--c-comment)", fontStyle: "italic" },
  { tag: [t.function(t.variableName), t.function(t.propertyName), t.macroName], color: "var(--c-function)" },
  { tag: [t.typeName, t.className, t.namespace, t.tagName], color: "var(--c-type)" },
  { tag: [t.propertyName, t.attributeName, t.labelName], color: "var(--c-property)" },
  { tag: [t.punctuation, t.separator, t.bracket, t.angleBracket, t.operator], color: "var(--c-punctuation)" },
  { tag: [t.heading], color: "var(--c-keyword)", fontWeight: "650" },
  { tag: [t.link, t.url], color: "var(--c-string)", textDecoration: "underline" },
  { tag: t.strong, fontWeight: "700" },
  { tag: t.emphasis, fontStyle: "italic" },
  { tag: t.invalid, color: "var(--bad)" },
]);

export const theme = [look, syntaxHighlighting(colours)];

/** The nonce by which the page's content security policy lets the editor add its styles. */
export function nonce(): string {
  return document.querySelector<HTMLMetaElement>('meta[name="csp-nonce"]')?.content ?? "";
}
