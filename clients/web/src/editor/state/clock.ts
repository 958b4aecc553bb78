/** Keeps the gateway's time, by which sessions end: this device's clock may be wrong. */

/** A smaller difference is what an answer takes, and that it says whole seconds only. */
const LEAST = 5000;
let ahead = 0;

/** Takes the time of an answer's `Date` header. */
export function heed(date: string | null): void {
  const off = Date.parse(date ?? "") - Date.now();
  if (!Number.isNaN(off)) ahead = Math.abs(off) < LEAST ? 0 : off;
}

/** Returns the time of the gateway, in milliseconds since the epoch. */
export function now(): number {
  return Date.now() + ahead;
}
