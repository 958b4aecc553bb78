/** Toasts: short messages in a corner. */

import { signal } from "@preact/signals";

export interface Toast {
  readonly id: number;
  readonly kind: "info" | "error";
  readonly text: string;
  /** What can be done about it. */
  readonly action?: Action | undefined;
}

export interface Action {
  readonly label: string;
  readonly run: () => void;
}

const LIFE = { info: 4000, error: 9000 };

export const toasts = signal<readonly Toast[]>([]);
let last = 0;

export function say(text: string, kind: Toast["kind"] = "info", action?: Action): void {
  const toast = { id: ++last, kind, text, action };
  toasts.value = [...toasts.value.slice(-3), toast];
  setTimeout(() => dismiss(toast.id), LIFE[action === undefined ? kind : "error"]);
}

export function dismiss(id: number): void {
  toasts.value = toasts.value.filter((toast) => toast.id !== id);
}

/** Tells a failure. Says nothing of what the user gave up himself, nor that a session ended: the window says it. */
export function complain(error: unknown, doing?: string): void {
  const code = (error as { code?: string }).code;
  if (code === "cancelled" || code === "unauthorized") return;
  const message = error instanceof Error ? error.message : String(error);
  say(doing === undefined ? message : `${doing}: ${message}`, "error");
}
