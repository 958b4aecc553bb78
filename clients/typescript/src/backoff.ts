/** The pauses between the attempts of one operation. */

export interface Backoff {
  readonly first: number;
  readonly most: number;
}

/** Returns the milliseconds to wait after the given number of failures, at least one: doubled each time, up to `most`. */
export function pause(failures: number, { first = 250, most = 8000 }: Partial<Backoff> = {}): number {
  return Math.min(most, first * 2 ** Math.min(failures - 1, 16));
}
