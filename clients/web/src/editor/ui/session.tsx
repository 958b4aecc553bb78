/** Asks for another token before a session ends, and after: without taking anything from the window behind. */

import { useEffect, useRef, useState } from "preact/hooks";
import { now } from "../state/clock.js";
import { ends, endsSoon, session } from "../state/session.js";
import type { Workspace } from "../state/workspace.js";
import { Dialog, Icon, Spinner } from "./parts.js";
import { SignInCard, useToken } from "./sign-in.js";

/** Milliseconds after the last key until a dialog may cover the window, so that typing is not interrupted. */
const PAUSE = 1500;
let lastKey = 0;
addEventListener("keydown", () => (lastKey = Date.now()), { capture: true });

export function SessionEnd({ current }: { current: Workspace }) {
  const over = session.value === null;
  const [covered, cover] = useState(false);
  useEffect(() => {
    cover(false);
    if (!over) return;
    const timer = setInterval(() => {
      if (Date.now() - lastKey < PAUSE) return;
      clearInterval(timer);
      cover(true);
    }, 100);
    return () => clearInterval(timer);
  }, [over]);
  if (over && covered) return <Ended current={current} onWrite={() => cover(false)} />;
  return over || endsSoon.value ? <Bar current={current} over={over} /> : null;
}

/** A line over everything, which covers nothing. */
function Bar({ current, over }: { current: Workspace; over: boolean }) {
  const { token, setToken, busy, failure, submit, ready } = useToken((typed) => current.renew(typed));
  return (
    <form class={`session-bar ${over ? "bad" : ""}`} onSubmit={submit} aria-label="The session">
      <Icon name="key-round" size={15} />
      <span role={over ? "alert" : "status"}>
        {over ? "The session has ended. Your text stays here, and saves wait until you sign in." : <Left />}
      </span>
      <div class="field small">
        <input
          type="password"
          aria-label="New access token"
          autocomplete="current-password"
          spellcheck={false}
          placeholder="New access token"
          value={token}
          aria-invalid={failure !== null}
          onInput={(event) => setToken(event.currentTarget.value)}
        />
      </div>
      <button type="submit" class="primary" disabled={!ready}>
        {busy ? <Spinner label="Signing in" /> : over ? "Sign in" : "Continue with it"}
      </button>
      {failure !== null && (
        <p class="problem" role="alert">
          {failure}
        </p>
      )}
    </form>
  );
}

function Left() {
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((count) => count + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  const ms = Math.max(0, (ends.value ?? 0) - now());
  const left = Math.ceil(ms / 1000);
  const at = new Date(Date.now() + ms).toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit" });
  // said once: a screen reader would tell every second
  return (
    <>
      This session ends at {at}
      <span aria-hidden="true">{left >= 60 ? `, in ${Math.ceil(left / 60)} min` : `, in ${left} s`}</span>. A
      new token extends it.
    </>
  );
}

function Ended({ current, onWrite }: { current: Workspace; onWrite: () => void }) {
  const heading = useRef<HTMLDivElement>(null);
  const unsaved = current.documents.tabs.open.value.filter(({ dirty }) => dirty.value).length;
  useEffect(() => heading.current?.focus(), []);
  return (
    <Dialog label="The session has ended" class="signing-in" onClose={onWrite}>
      {/* the focus is on no field: a letter that was meant for the text still goes there */}
      <div
        ref={heading}
        tabIndex={-1}
        role="document"
        onKeyDown={(event) => {
          if (event.target !== event.currentTarget || event.key.length !== 1) return;
          if (event.ctrlKey || event.metaKey || event.altKey) return;
          heading.current?.closest("dialog")?.close(); // gives the focus back at once
          onWrite();
        }}
      >
        <SignInCard
          title="The session has ended"
          said={null}
          take={(token) => current.renew(token)}
          autofocus={false}
          footer={
            <button type="button" onClick={onWrite}>
              Keep writing
            </button>
          }
        >
          <p>
            Sign in to continue with {current.name}. Files, terminals and your text stay as they are
            {unsaved > 0 && `, ${unsaved === 1 ? "one file" : `${unsaved} files`} unsaved`}; what you save
            until then waits, and is saved when you sign in.
          </p>
        </SignInCard>
      </div>
    </Dialog>
  );
}
