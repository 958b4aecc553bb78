/** Notices above a file, and the view of a file that is not text. */

import { keysOf } from "../state/commands.js";
import type { Doc } from "../state/doc.js";
import type { Workspace } from "../state/workspace.js";
import { bytes, Empty, Icon, Key, Spinner } from "./parts.js";
import { Logo } from "./sign-in.js";

/** Notices: somebody else changed the file, it is gone, or it is read-only. */
export function Told({ doc, current }: { doc: Doc; current: Workspace }) {
  const { documents } = current;
  if (doc.theirs.value !== null) {
    const gone = doc.theirs.value.text === null;
    return (
      <div class="told warn" role="alert">
        <Icon name="git-compare" size={15} />
        <span>
          {gone
            ? "Somebody deleted this file while you were changing it."
            : `${doc.writtenBy.value || "Somebody"} changed lines you are editing.`}
        </span>
        <button
          type="button"
          onClick={() => {
            documents.comparing.value = doc;
          }}
        >
          Compare and choose
        </button>
      </div>
    );
  }
  if (doc.gone.value) {
    return (
      <div class="told warn" role="status">
        <Icon name="trash" size={15} />
        <span>This file was deleted. Saving creates it again.</span>
      </div>
    );
  }
  return null;
}

export function Instead({ doc, current }: { doc: Doc; current: Workspace }) {
  switch (doc.phase.value) {
    case "ready":
      return null;
    case "loading":
      return (
        <div class="centre">
          <Spinner label={`Reading ${doc.name}`} />
        </div>
      );
    case "image":
      return (
        <div class="centre picture">
          <img src={doc.image.value ?? ""} alt={doc.path} />
          <p class="hint">{bytes(doc.size.value)}</p>
        </div>
      );
    case "binary":
      return (
        <Empty icon="file" title="Not text">
          {doc.name} has {bytes(doc.size.value)} of data that a text editor cannot show.
        </Empty>
      );
    case "failed":
      return (
        <Empty icon="circle-alert" title={`${doc.name} cannot be shown`}>
          <p>{doc.failure.value}</p>
          <button type="button" onClick={() => void current.documents.load(doc)}>
            Try again
          </button>
        </Empty>
      );
  }
}

const HINTS: readonly (readonly [string, string])[] = [
  ["file.open", "Open a file"],
  ["palette", "Run a command"],
  ["search", "Search in all files"],
  ["terminal.toggle", "Terminal"],
  ["preview.toggle", "Preview of the site"],
];

export function Welcome() {
  return (
    <div class="welcome">
      <Logo size={44} />
      <dl>
        {HINTS.map(([id, text]) => {
          const keys = keysOf(id);
          return (
            keys !== undefined && (
              <div key={id}>
                <dt>{text}</dt>
                <dd>
                  {keys.split("+").map((key) => (
                    <Key key={key}>{key}</Key>
                  ))}
                </dd>
              </div>
            )
          );
        })}
      </dl>
    </div>
  );
}
