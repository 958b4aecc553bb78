/** Has what nobody waits for come after what is waited for. */

import { effect } from "@preact/signals";

/** Milliseconds after which it comes though the page is busy. */
const PATIENCE = 1000;

/** Resolves at the page's next free moment. */
export function idle(): Promise<void> {
  return new Promise((resolve) => {
    // Safari has none
    if ("requestIdleCallback" in window) requestIdleCallback(() => resolve(), { timeout: PATIENCE });
    else setTimeout(resolve, 50);
  });
}

/** Milliseconds after a key until a person who has the cursor in a text no longer counts as typing. */
const TYPING = 5000;
let typedAt = Number.NEGATIVE_INFINITY;
let composing = false;

// `input`, too: a phone's keyboard and a dictation give no keys
for (const kind of ["keydown", "input", "compositionstart", "compositionend"])
  addEventListener(
    kind,
    () => {
      typedAt = performance.now();
      if (kind.startsWith("composition")) composing = kind === "compositionstart";
    },
    { capture: true },
  );

/** Returns the milliseconds that a person must be left alone because of keys that were just pressed, 0 for none. */
export function typing(): number {
  return composing ? TYPING : Math.max(0, typedAt + TYPING - performance.now());
}

/** Resolves once this is so, or after `atMost` milliseconds. */
export function once(so: () => boolean, atMost = 3000): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(() => end(), atMost);
    const stop = effect(() => {
      if (so()) queueMicrotask(() => end()); // an effect cannot end while it runs
    });
    const end = () => {
      clearTimeout(timer);
      stop();
      resolve();
    };
  });
}
