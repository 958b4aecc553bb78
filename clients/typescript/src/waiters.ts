/** Requests that wait for a value that others are about to get, each with its own patience. */

import { cancelled, type GatewayError } from "./errors.js";

interface Waiter<Value> {
  resolve(value: Value): void;
  reject(error: GatewayError): void;
}

export class Waiters<Value> {
  readonly #waiting = new Set<Waiter<Value>>();

  /** Waits up to `patience` milliseconds, then throws what `late` returns. An abort of `signal` throws `cancelled`. */
  wait(patience: number, late: () => GatewayError, signal?: AbortSignal): Promise<Value> {
    if (signal?.aborted) return Promise.reject(cancelled());
    return new Promise((resolve, reject) => {
      const end = () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", abort);
        this.#waiting.delete(waiter);
      };
      const waiter = {
        resolve: (value: Value) => {
          end();
          resolve(value);
        },
        reject: (error: GatewayError) => {
          end();
          reject(error);
        },
      };
      const abort = () => waiter.reject(cancelled());
      const timer = setTimeout(() => waiter.reject(late()), patience);
      signal?.addEventListener("abort", abort);
      this.#waiting.add(waiter);
    });
  }

  resolve(value: Value): void {
    for (const waiter of [...this.#waiting]) waiter.resolve(value);
  }

  reject(error: GatewayError): void {
    for (const waiter of [...this.#waiting]) waiter.reject(error);
  }
}
