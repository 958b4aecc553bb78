/** Keeps the session: its subject and its end. The token itself is never kept: it becomes a cookie no script can read. */

import { Gateway, GatewayError, type Session } from "@incus-gateway/client";
import { computed, effect, signal } from "@preact/signals";
import { heed, now } from "./clock.js";
import { request } from "./network.js";
import * as slots from "./slots.js";

const CLIENT = { name: "incus-gateway editor", version: "1" };

export const gateway = new Gateway(location.origin, {
  client: CLIENT,
  fetch: async (url, init) => {
    const response = await request(url, init);
    heed(response.headers.get("Date"));
    if (response.status === 401 && !String(url).endsWith("/v1/session")) void look();
    return response;
  },
});

/** undefined until the gateway was asked; null once it has ended. */
export const session = signal<Session | null | undefined>(undefined);
/** Why one has to sign in, where there is more to say than that. */
export const notice = signal<string | null>(null);

/** The session, or the one that ended: the window stays as it was until there is another. */
const last = signal<Session | null>(null);
effect(() => {
  if (session.value) last.value = session.value;
});

export function allows(scope: string): boolean {
  const scopes = last.value?.scopes ?? [];
  return scopes.includes(scope) || scopes.includes("admin");
}

/** Whose session it is, or was. */
export function who(): string {
  return last.value?.subject ?? "";
}

// --- the address ---------------------------------------------------------------------------------------

export interface Address {
  readonly token: string | null;
  readonly tenant: string | null;
  readonly file: string | null;
}

/** Reads `#token=…&tenant=…` or `#TENANT/FILE`, and takes a token out of the address at once. */
export function readAddress(address = location.href): Address {
  const hash = new URL(address).hash.slice(1);
  if (hash.includes("=")) {
    const values = new URLSearchParams(hash);
    const tenant = values.get("tenant");
    history.replaceState(null, "", tenant === null ? location.pathname : `#${tenant}`);
    return { token: values.get("token"), tenant, file: null };
  }
  const [tenant = "", ...file] = hash.split("/").map(decodeURIComponent);
  return { token: null, tenant: tenant || null, file: file.join("/") || null };
}

export function writeAddress(tenant: string, file: string | null): void {
  const path = file === null ? "" : `/${file.split("/").map(encodeURIComponent).join("/")}`;
  history.replaceState(null, "", `#${tenant}${path}`);
}

// --- signing in and out --------------------------------------------------------------------------------

let looking: Promise<void> | null = null;

/** Asks the gateway for the session of this tab. Concurrent calls share one answer. */
export function look(): Promise<void> {
  looking ??= (async () => {
    try {
      session.value = await gateway.session();
      slots.use(gateway.slot);
    } catch (error) {
      const ended = error instanceof GatewayError && error.code === "unauthorized";
      if (!ended) notice.value = error instanceof Error ? error.message : String(error);
      if (ended || session.value === undefined) session.value = null;
    } finally {
      looking = null;
    }
  })();
  return looking;
}

/**
 * Begins with the session that this tab had before it was loaded, or that a new tab begins with; returns whether it is
 * the tab's own. Where it is `led` here by a token and this browser never had a session there is none to ask for.
 */
export async function resume(tenant: string | null, led: boolean): Promise<boolean> {
  const own = slots.owns();
  gateway.slot = slots.take(tenant);
  if (!led || slots.used()) await look();
  return own;
}

/** Returns what a token grants, without signing in by it. */
export function identify(token: string): Promise<Session> {
  return new Gateway(location.origin, { token, client: CLIENT, fetch: request }).session();
}

/**
 * Returns the session that a sign-in from the address would go past, which is to be asked about: the tab's `own` where
 * it opens other tenants, and any other person's in this browser. Otherwise a stranger's page could make somebody work,
 * unknowing, in the stranger's tenant.
 */
export function goesPast(found: Session, own: boolean): Session | null {
  const current = session.value ?? last.value;
  if (current !== null) {
    if (slots.alike(current, found)) return null;
    if (own || current.subject !== found.subject) return current;
  }
  return slots.known().find(({ subject }) => subject !== found.subject) ?? null;
}

/** Signs in by a token, in a slot where no other session is replaced. Throws where the gateway does not take it. */
export async function signIn(token: string, found?: Session): Promise<void> {
  const granted = found ?? (await identify(token));
  const before = gateway.slot;
  gateway.slot = slots.place(granted);
  try {
    session.value = await gateway.signIn(token);
  } catch (error) {
    gateway.slot = before;
    throw error;
  }
  notice.value = null;
  slots.keep(session.value, gateway.slot);
}

export async function signOut(): Promise<void> {
  await gateway.signOut();
  slots.forget(gateway.slot);
  session.value = last.value = null;
}

/** Resolves as soon as somebody is signed in. */
export function signedIn(ending?: AbortSignal): Promise<void> {
  if (session.value || ending?.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    const end = () => {
      stop();
      ending?.removeEventListener("abort", end);
      resolve();
    };
    const stop = session.subscribe((now) => now && end());
    ending?.addEventListener("abort", end);
  });
}

// another tab has signed this slot in again, or out
slots.onChange(() => {
  const kept = slots.known().find(({ slot }) => slot === gateway.slot);
  if (session.value === undefined || kept?.expires === session.value?.expires) return;
  if (kept !== undefined || gateway.slot !== null) void look();
});

// --- the end of a session ------------------------------------------------------------------------------

/** What a timer can hold. */
const LONGEST = 2 ** 31 - 1;
const LEAD = 5 * 60_000;

/** When the session ends, in milliseconds since the epoch by the gateway's clock; null without a session. */
export const ends = computed(() => (session.value ? session.value.expires * 1000 : null));

/** Whether the session ends soon: in five minutes, or in a fifth of its life if that is less. */
export const endsSoon = signal(false);

effect(() => {
  const end = ends.value;
  endsSoon.value = false;
  if (end === null) return;
  const since = slots.known().find(({ slot }) => slot === gateway.slot)?.since;
  const begun = since === undefined ? now() : since * 1000;
  const soon = end - Math.min(LEAD, Math.max(0, end - begun) / 5);
  let timer: ReturnType<typeof setTimeout>;
  const wait = () => {
    const at = now();
    if (at >= soon) endsSoon.value = true;
    // a little after its end the gateway is asked, where nothing else has asked it by then
    const left = (at < soon ? soon : end + 1000) - at;
    if (left > 0) timer = setTimeout(wait, Math.min(left, LONGEST));
    else void look();
  };
  wait();
  return () => clearTimeout(timer);
});
