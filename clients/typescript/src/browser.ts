/** What a browser tells about the network and the page; elsewhere nothing. */

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
