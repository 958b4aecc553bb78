/** Bytes in JSON. */

/** Returns bytes in base64. */
export function base64(data: Uint8Array): string {
  let text = ""; // of characters that are a byte each; too many arguments at once are too much for an engine
  for (let start = 0; start < data.length; start += 8192) {
    text += String.fromCharCode(...data.subarray(start, start + 8192));
  }
  return btoa(text);
}
