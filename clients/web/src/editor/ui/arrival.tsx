/** Asks before a token in the address signs this tab in past another session. */

import type { Session } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { session } from "../state/session.js";
import { Dialog, Names } from "./parts.js";

const asked = signal<{
  readonly found: Session;
  readonly past: Session;
  answer(yes: boolean): void;
} | null>(null);

/** Whether a link brought a token, and it is not decided yet which session the page takes. */
export const arriving = signal(false);

/** Returns whether the person wants to be signed in as the token says. */
export function askToSignIn(found: Session, past: Session): Promise<boolean> {
  asked.value?.answer(false);
  return new Promise((resolve) => {
    const answer = (yes: boolean) => {
      asked.value = null;
      resolve(yes);
    };
    asked.value = { found, past, answer };
  });
}

export function Arrival() {
  if (asked.value === null) return null;
  const { found, past, answer } = asked.value;
  return (
    <Dialog label="Another sign-in" class="small" onClose={() => answer(false)}>
      <h2>
        Sign in as <bdi>{found.subject}</bdi> for <Names names={found.tenants} />?
      </h2>
      <p>
        The link that led here brings its own sign-in. You {session.value ? "are" : "were"} signed in as{" "}
        <bdi>{past.subject}</bdi> for <Names names={past.tenants} />. If you did not ask for it, stay: they
        could read what you type there.
      </p>
      <footer>
        <button type="button" onClick={() => answer(true)}>
          Sign in in this tab
        </button>
        <button type="button" class="primary" autofocus onClick={() => answer(false)}>
          Cancel
        </button>
      </footer>
    </Dialog>
  );
}
