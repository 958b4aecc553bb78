/** Delays work that nobody waits for, and knows whether a person is typing. */

import { effect } from "@preact/signals";

/** Milliseconds after which the work starts even though the page is busy. */
const PATIENCE = 1000;

/** Resolves when the page is idle. */
export function idle(): Promise<void> {
  return new Promise((resolve) => {
    // Safari has none
    if ("requestIdleCallback" in window) requestIdleCallback(() => resolve(), { timeout: PATIENCE });
    else setTimeout(resolve, 50);
  });
}

/** Milliseconds after the last key for which a person still counts as typing. */
const TYPING = 5000;
let typedAt = Number.NEGATIVE_INFINITY;
let composing = false;

// `input` too: phone keyboards and dictation send no keys
for (const kind of ["keydown", "input", "compositionstart", "compositionend"])
  addEventListener(
    kind,
    () => {
      typedAt = performance.now();
      if (kind.startsWith("composition")) composing = kind === "compositionstart";
    },
    { capture: true },
  );

/** Returns for how many milliseconds a person still counts as typing, 0 if they do not. */
export function typing(): number {
  return composing ? TYPING : Math.max(0, typedAt + TYPING - performance.now());
}

/** Resolves once `so` returns true, or after `atMost` milliseconds. */
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
