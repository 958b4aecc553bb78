/** The conflict dialog: both versions side by side, with three ways to settle. */

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
  const close = () => {
    documents.comparing.value = null;
  };
  const text = theirs?.text ?? "";
  useEffect(() => {
    let gone = false;
    void (async () => {
      const { compare } = await load(() => import("../code/merge.js"));
      if (gone || host.current === null) return;
      host.current.replaceChildren();
      comparison.current = await compare(host.current, doc.path, text, doc.text);
      setReady(true);
    })().catch(complain);
    return () => {
      gone = true;
      comparison.current?.destroy();
      comparison.current = null;
    };
  }, [doc, text]);
  if (theirs === null) {
    close();
    return null;
  }
  const settle = async (chosen: string) => {
    if (await documents.settle(doc, chosen)) close();
  };
  const gone = theirs.text === null;
  return (
    <Dialog label={`Conflict in ${doc.name}`} class="conflict" onClose={close}>
      <header>
        <Icon name="git-compare" />
        <h2>{gone ? `${doc.name} was deleted meanwhile` : `${doc.name} was changed meanwhile`}</h2>
      </header>
      <div class="sides" aria-hidden="true">
        <span>{gone ? "Theirs: the file was deleted" : "Theirs, as the file is now"}</span>
        <span>Mine, to be saved — edit it here, or take parts with the arrows</span>
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
