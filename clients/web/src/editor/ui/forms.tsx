/** Small forms: a question that has to be answered before something happens, and a field with a button. */

import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { Dialog } from "./parts.js";

export interface Question {
  readonly title: string;
  readonly text: string;
  readonly verb: string;
  /** What has to be typed first. */
  readonly word?: string;
  run(): void;
}

/** The question that is asked now. */
export const asking = signal<Question | null>(null);

export function Asking({ question }: { question: Question }) {
  const [typed, setTyped] = useState("");
  const close = () => {
    asking.value = null;
  };
  const { word } = question;
  return (
    <Dialog label={question.title} class="small" onClose={close}>
      <h2>{question.title}</h2>
      <p>{question.text}</p>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (word !== undefined && typed !== word) return;
          close();
          question.run();
        }}
      >
        {word !== undefined && (
          <label class="confirm">
            Type <code>{word}</code> to confirm
            <span class="field">
              <input
                spellcheck={false}
                value={typed}
                onInput={(event) => setTyped(event.currentTarget.value)}
              />
            </span>
          </label>
        )}
        <footer>
          <button type="button" onClick={close}>
            Leave it
          </button>
          <button type="submit" class="danger" disabled={word !== undefined && typed !== word}>
            {question.verb}
          </button>
        </footer>
      </form>
    </Dialog>
  );
}

interface Draft {
  readonly text: string;
  /** It was not changed since it was submitted. */
  readonly sent: boolean;
}

/** One field with a button. It shows the `initial` value as that changes, but for what was typed and not done yet. */
export function Typed(props: {
  label: string;
  initial?: string;
  placeholder?: string;
  verb: string;
  hint: string;
  empty?: boolean;
  run: (typed: string) => Promise<boolean>;
}) {
  const { initial } = props;
  const [draft, setDraft] = useState<Draft | null>(null);
  const [busy, setBusy] = useState(false);
  const typed = draft?.text ?? initial ?? "";
  const text = typed.trim();
  useEffect(() => setDraft((now) => (now?.sent || now?.text === initial ? null : now)), [initial]);
  return (
    <form
      class="typed"
      onSubmit={async (event) => {
        event.preventDefault();
        setBusy(true);
        setDraft({ text: typed, sent: true });
        const done = await props.run(text);
        if (!done) setDraft((now) => (now === null || now.sent ? { text: typed, sent: false } : now));
        else if (initial === undefined) setDraft((now) => (now?.sent ? null : now));
        setBusy(false);
      }}
    >
      <label>
        <span>{props.label}</span>
        <span class="field small">
          <input
            placeholder={props.placeholder}
            spellcheck={false}
            autocapitalize="off"
            value={typed}
            onInput={(event) => setDraft({ text: event.currentTarget.value, sent: false })}
          />
        </span>
      </label>
      <button type="submit" disabled={busy || text === initial || (text === "" && !props.empty)}>
        {props.verb}
      </button>
      <p class="hint">{props.hint}</p>
    </form>
  );
}
