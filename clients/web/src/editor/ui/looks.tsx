/** A file as the page or picture that it is. */

import type { ComponentChild } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Doc } from "../state/doc.js";
import { load } from "../state/network.js";
import { Icon } from "./parts.js";
import { caret } from "./view.js";

/** Files that can be shown as a page or picture instead of their text. */
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

/** Renders Markdown; null until the first page is ready. Versions are skipped if the text changes too fast. */
export function useMarkdown(text: string): ComponentChild {
  const [page, setPage] = useState<ComponentChild>(null);
  const latest = useRef<string | null>(text);
  const making = useRef(false);
  latest.current = text;
  // before the browser paints the plain text, if rendering is fast
  useLayoutEffect(() => {
    if (making.current) return;
    making.current = true;
    void load(() => import("../code/markdown.js"))
      .then(async ({ rendered }) => {
        for (let shown: string | null = null; latest.current !== null && latest.current !== shown; ) {
          shown = latest.current;
          const made = await rendered(shown);
          if (latest.current !== null) setPage(made);
        }
      })
      .catch(() => {}) // `missing` is told
      .finally(() => {
        making.current = false;
      });
  }, [text]);
  useEffect(
    () => () => {
      latest.current = null;
    },
    [],
  );
  return page;
}

function Page({ doc, text }: { doc: Doc; text: string }) {
  const page = useMarkdown(text);
  return (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keys
    <section class="look" tabIndex={0} aria-label={`Preview of ${doc.name}`}>
      {page}
    </section>
  );
}
