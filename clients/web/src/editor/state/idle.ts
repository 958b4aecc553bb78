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
