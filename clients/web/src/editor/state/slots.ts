/**
 * Keeps which sessions this browser has with the gateway, and which of them this tab uses. Each has a slot: a name that
 * is no secret, and a cookie of its own that no script can read.
 */

import type { Session } from "@incus-gateway/client";
import { unique } from "@incus-gateway/client";
import { now } from "./clock.js";

export interface Kept extends Omit<Session, "id" | "slot"> {
  readonly slot: string;
  /** When it was signed in, in seconds since the epoch. */
  readonly since: number;
}

/** The tab's slot, which outlives a reload; the last used one, which a new tab begins with; all that are known. */
const [OWN, LAST, LIST] = ["gateway.slot", "gateway.slot.last", "gateway.sessions"];
/** The gateway clears the cookies of more. */
const MOST = 8;
const SLOT = /^[a-z0-9]{1,32}$/;

function seconds(): number {
  return now() / 1000;
}

/** Returns the sessions that have not ended, the one signed in last first. */
export function known(): readonly Kept[] {
  return all().filter(({ expires }) => expires > seconds());
}

/** What is in storage is not trusted. */
function all(): readonly Kept[] {
  try {
    const list: unknown = JSON.parse(localStorage.getItem(LIST) ?? "[]");
    if (!Array.isArray(list)) return [];
    return list.filter(
      ({ slot, subject, tenants, scopes, since, expires }) =>
        SLOT.test(slot) &&
        typeof subject === "string" &&
        Array.isArray(tenants) &&
        Array.isArray(scopes) &&
        typeof since === "number" &&
        typeof expires === "number",
    );
  } catch {
    return [];
  }
}

function write(list: readonly Kept[]): void {
  try {
    localStorage.setItem(LIST, JSON.stringify(list));
  } catch {
    // storage is full or forbidden: this tab still works
  }
}

/** Says whether two sessions are of the same person for the same tenants. */
export function alike(one: Session, other: Session): boolean {
  const sorted = (names: readonly string[]) => JSON.stringify([...names].sort());
  return one.subject === other.subject && sorted(one.tenants) === sorted(other.tenants);
}

export function covers({ tenants }: Session, tenant: string): boolean {
  return tenants.includes("*") || tenants.includes(tenant);
}

/** Whether this tab has a session of its own, be it one without a slot. A new tab has none. */
export function owns(): boolean {
  return sessionStorage.getItem(OWN) !== null;
}

/** Whether this browser ever had a session here. */
export function used(): boolean {
  return owns() || localStorage.getItem(LAST) !== null;
}

/**
 * Returns the slot of this tab: its own, else the last used one, else, where that has ended or does not open `tenant`,
 * one that does. Null for the cookie without a slot.
 */
export function take(tenant: string | null): string | null {
  let slot = sessionStorage.getItem(OWN);
  if (slot === null) {
    slot = localStorage.getItem(LAST) ?? "";
    const fit = known().filter((entry) => tenant === null || covers(entry, tenant));
    // nobody knows here what the cookie without a slot opens
    if ((slot !== "" || tenant !== null) && !fit.some((entry) => entry.slot === slot))
      slot = fit[0]?.slot ?? slot;
  }
  return SLOT.test(slot) ? slot : null;
}

/** Has this tab use a slot from now on, also after a reload, and new tabs begin with it. */
export function use(slot: string | null): void {
  try {
    sessionStorage.setItem(OWN, slot ?? "");
    localStorage.setItem(LAST, slot ?? "");
  } catch {
    // as above
  }
}

/**
 * Returns the slot for a session that is about to be signed in: that of the same person with the same rights, which may
 * have ended and is shortened for nobody, else a new one. What another tab works with is never replaced.
 */
export function place(session: Session): string {
  const same = all().find(
    (entry) =>
      alike(entry, session) &&
      [...entry.scopes].sort().join() === [...session.scopes].sort().join() &&
      entry.expires <= session.expires,
  );
  return same?.slot ?? unique().slice(0, 16);
}

/** Remembers a session. */
export function keep(session: Session, slot: string): void {
  const { subject, tenants, scopes, expires } = session;
  const others = all().filter((entry) => entry.slot !== slot);
  write([{ slot, subject, tenants, scopes, since: seconds(), expires }, ...others.slice(0, MOST - 1)]);
  use(slot);
}

export function forget(slot: string | null): void {
  write(all().filter((entry) => entry.slot !== slot));
}

/** Calls `listener` when another tab signs in or out. */
export function onChange(listener: () => void): void {
  addEventListener("storage", ({ key }) => {
    if (key === LIST) listener();
  });
}
