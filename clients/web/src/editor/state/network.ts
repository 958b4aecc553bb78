/** Bears a network that fails for a moment: asks again what only reads, and loads again what code did not come. */

import { signal } from "@preact/signals";

/** Milliseconds before each further try: a network that changes, as from one Wi-Fi to another, is there again by then. */
const PAUSES = [200, 400, 800, 1600];

/** Whether a part of the editor's code is missing for good; only loading the page again brings it. */
export const missing = signal(false);

/** Does something; again a few times while it fails and nobody has given it up. */
async function patiently<Result>(work: () => Promise<Result>, signal?: AbortSignal | null): Promise<Result> {
  for (const pause of PAUSES) {
    try {
      return await work();
    } catch (error) {
      if (signal?.aborted) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  return work();
}

/** Fetches as the browser does; what only reads again, for some seconds, while the network fails. */
export function request(url: RequestInfo | URL, init: RequestInit = {}): Promise<Response> {
  if (init.method !== undefined && init.method !== "GET") return fetch(url, init);
  return patiently(async () => whole(await fetch(url, init)), init.signal);
}

/** Returns an answer of JSON with all of its body, which may break off too. Others may be long, and are streamed. */
async function whole(answer: Response): Promise<Response> {
  const json = answer.headers.get("Content-Type")?.startsWith("application/json");
  return json && answer.body !== null ? new Response(await answer.arrayBuffer(), answer) : answer;
}

/** Loads a part of the editor's code, again while the network fails; what stays away is `missing`. */
export async function load<Part>(part: () => Promise<Part>): Promise<Part> {
  try {
    // a browser that keeps the failure of a module fails at once each time
    return await patiently(part);
  } catch {
    missing.value = true;
    throw new Error("A part of the editor did not load.");
  }
}

/** Says that the page's first files came: what index.html counts begins anew. */
export function loaded(): void {
  sessionStorage.removeItem("gateway.reloads");
}
