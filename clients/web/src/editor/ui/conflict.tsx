/** The conflict dialog: both versions side by side, with three ways to settle. Closing it keeps what was merged. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { Comparison } from "../code/merge.js";
import type { Doc } from "../state/doc.js";
import { load } from "../state/network.js";
import { complain } from "../state/toasts.js";
import type { Workspace } from "../state/workspace.js";
import { Dialog, Icon, Spinner } from "./parts.js";

export function Conflict({ current, doc }: { current: Workspace; doc: Doc }) {
  const { documents } = current;
  const theirs = doc.theirs.value;
  const host = useRef<HTMLDivElement>(null);
  const comparison = useRef<Comparison | null>(null);
  const [ready, setReady] = useState(false);
  const chosen = useRef(false);
  const close = () => {
    documents.comparing.value = null;
  };
  useEffect(() => {
    let gone = false;
    void (async () => {
      const { compare } = await load(() => import("../code/merge.js"));
      if (gone || host.current === null) return;
      host.current.replaceChildren();
      const made = await compare(host.current, doc.path, doc.base, doc.text);
      if (gone) return made.destroy();
      comparison.current = made;
      follow(made, doc);
      setReady(true);
    })().catch(complain);
    return () => {
      gone = true;
      const made = comparison.current;
      comparison.current = null;
      if (made === null) return;
      if (made.edited() && !chosen.current) {
        follow(made, doc);
        documents.merged(doc, made.mine());
      }
      made.destroy();
    };
  }, [doc, documents]);
  useEffect(() => {
    if (theirs !== null && comparison.current !== null) follow(comparison.current, doc);
  }, [doc, theirs]);
  if (theirs === null) {
    close();
    return null;
  }
  const settle = async (text: string) => {
    chosen.current = doc.theirs.value !== null;
    if (await documents.settle(doc, text)) close();
  };
  const gone = theirs.text === null;
  const by = doc.writtenBy.value || "Somebody";
  return (
    <Dialog label={`Conflict in ${doc.name}`} class="conflict" onClose={close}>
      <header>
        <Icon name="git-compare" />
        <h2>
          {gone ? `${doc.name} was deleted meanwhile` : `${by} changed lines of ${doc.name} you are editing`}
        </h2>
      </header>
      <div class="sides" aria-hidden="true">
        <span>{gone ? "Theirs: the file was deleted" : "Theirs, as the file is now"}</span>
        <span>Mine with their other lines, to be saved: edit it here, or take parts with the arrows</span>
      </div>
      <div class="merge" ref={host}>
        {!ready && (
          <div class="centre">
            <Spinner label="Comparing" />
          </div>
        )}
      </div>
      <footer>
        <button type="button" onClick={close}>
          Decide later
        </button>
        <span class="grow" />
        {!gone && (
          <button type="button" disabled={doc.saving.value} onClick={() => void settle(theirs.text ?? "")}>
            Take theirs
          </button>
        )}
        <button
          type="button"
          class="primary"
          disabled={doc.saving.value || !ready}
          onClick={() => void settle(comparison.current?.mine() ?? doc.text)}
        >
          Save mine
        </button>
      </footer>
    </Dialog>
  );
}

/** Updates a comparison with the file's present text. */
function follow(comparison: Comparison, doc: Doc): void {
  const theirs = doc.theirs.value;
  comparison.follow(theirs === null ? doc.saved : theirs.text);
}
