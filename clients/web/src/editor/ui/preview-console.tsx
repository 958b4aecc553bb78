/** The console below the preview: what its page reports. */

import type { Line } from "../state/preview.js";
import { IconButton } from "./parts.js";

export function PreviewConsole({ lines, clear }: { lines: readonly Line[]; clear: () => void }) {
  return (
    <section class="preview-console" aria-label="Errors of the page">
      <header>
        <h3>Errors of the page</h3>
        <span class="grow" />
        <IconButton icon="trash" label="Clear the list of errors" size={13} onClick={clear} />
      </header>
      <div
        class="scroll"
        role="log"
        // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keys
        tabIndex={0}
        aria-label="Errors and warnings"
      >
        {lines.length === 0 && <p class="where">None so far.</p>}
        {lines.map(({ kind, text, times }, index) => (
          <p key={index} class={kind}>
            {kind === "note" ? text : <code>{text}</code>}
            {times > 1 && <span class="where"> {times} times</span>}
          </p>
        ))}
      </div>
    </section>
  );
}
