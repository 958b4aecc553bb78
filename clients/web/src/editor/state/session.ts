/** Knows who is signed in. The token itself is never kept: it becomes a cookie that no script can read. */

import { signal } from "@preact/signals";
import { Gateway, GatewayError, type Session } from "../../client/index.js";

export const gateway = new Gateway(location.origin, {
  client: { name: "incus-gateway editor", version: "1" },
});

/** undefined until the gateway was asked. */
export const session = signal<Session | null | undefined>(undefined);
/** Why one has to sign in, where there is more to say than that. */
export const notice = signal<string | null>(null);

export function allows(scope: string): boolean {
  const scopes = session.value?.scopes ?? [];
  return scopes.includes(scope) || scopes.includes("admin");
}

export interface Address {
  readonly token: string | null;
  readonly tenant: string | null;
  readonly file: string | null;
}

/** Reads `#token=…&tenant=…` or `#TENANT/FILE`, and takes a token out of the address at once. */
export function readAddress(): Address {
  const hash = location.hash.slice(1);
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

export async function resume(token: string | null): Promise<void> {
  if (token !== null) {
    await signIn(token).catch((error: unknown) => {
      notice.value = error instanceof Error ? error.message : String(error);
      session.value = null;
    });
    return;
  }
  try {
    session.value = await gateway.session();
  } catch (error) {
    if (!(error instanceof GatewayError) || error.code !== "unauthorized") notice.value = String(error);
    session.value = null;
  }
}

/** Throws what the gateway says where it does not take the token. */
export async function signIn(token: string): Promise<void> {
  session.value = await gateway.signIn(token.trim());
  notice.value = null;
}

export async function signOut(): Promise<void> {
  await gateway.signOut();
  session.value = null;
}
