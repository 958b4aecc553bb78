/** Shows how one signs in: as the first view, and over the window of a session that has ended. */

import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";
import { notice, signIn } from "../state/session.js";
import { Icon, Spinner } from "./parts.js";

/** Takes a typed token: what is typed, whether it is tried now, and why it was not taken. */
export function useToken(take: (token: string) => Promise<void>) {
  const [token, setToken] = useState("");
  const [busy, setBusy] = useState(false);
  const [failure, setFailure] = useState<string | null>(null);
  const submit = async (event: Event) => {
    event.preventDefault();
    if (token.trim() === "" || busy) return;
    setBusy(true);
    setFailure(null);
    try {
      await take(token.trim());
      setToken("");
    } catch (error) {
      setFailure(error instanceof Error ? error.message : String(error));
    } finally {
      setBusy(false);
    }
  };
  return { token, setToken, busy, failure, submit, ready: !busy && token.trim() !== "" };
}

export function SignIn({ onDone }: { onDone: () => void }) {
  const take = async (token: string) => {
    await signIn(token);
    onDone();
  };
  return (
    <main class="sign-in">
      <SignInCard title="Sign in to incus-gateway" said={notice.value} take={take} autofocus>
        <p>
          Paste an access token. It becomes a cookie that no script can read, and ends when the token does.
        </p>
      </SignInCard>
    </main>
  );
}

export function SignInCard(props: {
  title: string;
  said: string | null;
  take: (token: string) => Promise<void>;
  autofocus: boolean;
  children: ComponentChildren;
  footer?: ComponentChildren;
}) {
  const { token, setToken, busy, failure, submit, ready } = useToken(props.take);
  const said = failure ?? props.said;
  return (
    <form class="card" onSubmit={submit}>
      <div class="mark">
        <Logo size={36} />
      </div>
      <h1>{props.title}</h1>
      {props.children}
      <label for="token">Access token</label>
      <div class="field">
        <Icon name="key-round" size={15} />
        <input
          id="token"
          name="token"
          type="password"
          autocomplete="current-password"
          spellcheck={false}
          placeholder="eyJhbGciOi…"
          value={token}
          aria-invalid={said !== null}
          aria-describedby={said === null ? "hint" : "problem"}
          onInput={(event) => setToken(event.currentTarget.value)}
          autofocus={props.autofocus}
        />
      </div>
      {said !== null && (
        <p class="problem" id="problem" role="alert">
          <Icon name="circle-alert" size={14} /> {said}
        </p>
      )}
      <button type="submit" class="primary" disabled={!ready}>
        {busy ? <Spinner label="Signing in" /> : "Sign in"}
      </button>
      {props.footer}
      <p class="hint" id="hint">
        On the gateway's machine, <code>deploy/quickstart status</code> prints one for the demo, and{" "}
        <code>incus-gateway token --tenant NAME</code> makes one for a tenant.
      </p>
    </form>
  );
}

export function Logo({ size = 22 }: { size?: number }) {
  return (
    <svg class="logo" width={size} height={size} viewBox="0 0 32 32" aria-hidden="true">
      <rect width="32" height="32" rx="8" />
      <path d="M9 11.5 14 16l-5 4.5M16.5 21H23" />
    </svg>
  );
}
