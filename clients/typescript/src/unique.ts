/** Unique ids. `crypto.randomUUID` is missing on plain http from another machine. */

/** Returns 32 random hex digits. */
export function unique(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join("");
}
