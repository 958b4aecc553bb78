/** A file as the page or picture that it is. */

import type { ComponentChild } from "preact";
import { useEffect, useState } from "preact/hooks";
import type { Doc } from "../state/doc.js";
import { load } from "../state/network.js";
import { Icon } from "./parts.js";
import { caret } from "./view.js";

/** What can be looked at as a page or picture beside its text. */
export const PAGES = /\.(md|mdx|markdown|svg)$/i;

/** A file as a page or picture, if one asks for it. */
export function Looks({ doc }: { doc: Doc }) {
  void caret.value; // which changes with the text, also by others
  const looking = doc.looking.value;
  return (
    <>
      {looking &&
        (doc.path.toLowerCase().endsWith(".svg") ? (
          <Picture doc={doc} text={doc.text} />
        ) : (
          <Page doc={doc} text={doc.text} />
        ))}
      <button
        type="button"
        class="looks"
        aria-pressed={looking}
        onClick={() => {
          doc.looking.value = !looking;
        }}
      >
        <Icon name={looking ? "pencil" : "eye"} size={13} />
        {looking ? "Text" : "Preview"}
      </button>
    </>
  );
}

function Picture({ doc, text }: { doc: Doc; text: string }) {
  const [url, setUrl] = useState("");
  useEffect(() => {
    // as a picture nothing in it can run
    const made = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    setUrl(made);
    return () => URL.revokeObjectURL(made);
  }, [text]);
  return (
    <div class="look centre picture">
      <img src={url} alt={doc.path} />
    </div>
  );
}

function Page({ doc, text }: { doc: Doc; text: string }) {
  const [page, setPage] = useState<ComponentChild>(null);
  useEffect(() => {
    let gone = false;
    void load(() => import("../code/markdown.js")).then(
      ({ rendered }) => gone || setPage(rendered(text)),
      () => {}, // `missing` is told
    );
    return () => {
      gone = true;
    };
  }, [text]);
  return (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keys
    <section class="look" tabIndex={0} aria-label={`Preview of ${doc.name}`}>
      {page}
    </section>
  );
}
