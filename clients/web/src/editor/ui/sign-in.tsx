/** Knows the first view of who is not signed in. */

import { useState } from "preact/hooks";
import { notice, signIn } from "../state/session.js";
import { Icon, Spinner } from "./parts.js";

export function SignIn({ onDone }: { onDone: () => void }) {
  const [token, setToken] = useState("");
  const [busy, setBusy] = useState(false);
  const [failure, setFailure] = useState<string | null>(null);
  const said = failure ?? notice.value;
  const submit = async (event: Event) => {
    event.preventDefault();
    if (token.trim() === "" || busy) return;
    setBusy(true);
    setFailure(null);
    try {
      await signIn(token);
      onDone();
    } catch (error) {
      setFailure(error instanceof Error ? error.message : String(error));
    } finally {
      setBusy(false);
    }
  };
  return (
    <main class="sign-in">
      <form class="card" onSubmit={submit}>
        <div class="mark">
          <Logo size={36} />
        </div>
        <h1>Sign in to incus-gateway</h1>
        <p>
          Paste an access token. It becomes a cookie that no script can read, and ends when the token does.
        </p>
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
            autofocus
          />
        </div>
        {said !== null && (
          <p class="problem" id="problem" role="alert">
            <Icon name="circle-alert" size={14} /> {said}
          </p>
        )}
        <button type="submit" class="primary" disabled={busy || token.trim() === ""}>
          {busy ? <Spinner label="Signing in" /> : "Sign in"}
        </button>
        <p class="hint" id="hint">
          On the gateway's machine, <code>deploy/quickstart status</code> prints one for the demo, and{" "}
          <code>incus-gateway token --tenant NAME</code> makes one for a tenant.
        </p>
      </form>
    </main>
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
