/** What a browser tells about the network and the page; elsewhere nothing. */

import { Disconnected, GatewayError } from "./errors.js";

/** How long to ask whether anything answers at all, in milliseconds. */
const PROBE = 3_000;

/**
 * Returns why a gateway cannot be reached. A browser does not tell a page whether nothing answers or the answer is not for
 * it: then this asks for an answer that nobody may read.
 */
export async function unreachable(url: string, reason: string): Promise<GatewayError> {
  const nobody = new Disconnected(`no gateway answers at ${url}: ${reason}`);
  const origin = typeof location === "undefined" ? undefined : location.origin;
  if (origin === undefined || origin === new URL(url).origin) return nobody;
  try {
    const signal = AbortSignal.timeout(PROBE);
    await fetch(`${url}/healthz`, { mode: "no-cors", cache: "no-store", credentials: "omit", signal });
  } catch {
    return nobody;
  }
  const words = `the gateway at ${url} does not let pages of ${origin} in`;
  return new GatewayError("forbidden", `${words}: its operator can add that to GATEWAY_ORIGINS`);
}

export interface BrowserListener {
  /** There may be a network again, or the page is visible again. */
  readonly back: () => void;
  /** The browser reports no network. A gateway on this very device may be reachable all the same. */
  readonly offline: () => void;
}

export class Browser {
  readonly #window = typeof window === "undefined" ? null : window;
  readonly #listener: BrowserListener;

  constructor(listener: BrowserListener) {
    this.#listener = listener;
  }

  get isOffline(): boolean {
    return this.#window?.navigator.onLine === false;
  }

  listen(): void {
    this.#window?.addEventListener("online", this.#listener.back);
    this.#window?.addEventListener("offline", this.#listener.offline);
    this.#window?.document.addEventListener("visibilitychange", this.#look);
  }

  rest(): void {
    this.#window?.removeEventListener("online", this.#listener.back);
    this.#window?.removeEventListener("offline", this.#listener.offline);
    this.#window?.document.removeEventListener("visibilitychange", this.#look);
  }

  readonly #look = (): void => {
    if (this.#window?.document.visibilityState === "visible") this.#listener.back();
  };
}
