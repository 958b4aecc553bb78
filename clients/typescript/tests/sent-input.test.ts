/** What of a command's input is sent again after a break. */

import { expect, test } from "vitest";
import { SENT, SentInput } from "../src/sent-input.js";

const bytes = (text: string) => new TextEncoder().encode(text);
const text = (chunks: Uint8Array[] | null) =>
  chunks?.map((chunk) => new TextDecoder().decode(chunk)).join("|");

test("what had not arrived is sent again, once", () => {
  const sent = new SentInput();
  for (const chunk of ["one", "two", "three"]) sent.add(bytes(chunk));
  const missing = sent.after(4);
  expect(text(missing)).toBe("wo|three");
  for (const chunk of missing ?? []) sent.add(chunk);
  expect(text(sent.after(12 - 1))).toBe("");
});

test("the oldest is dropped beyond the limit", () => {
  const sent = new SentInput();
  for (let number = 0; number < 10; number++) sent.add(new Uint8Array(SENT / 4));
  const kept = SENT + SENT / 4;
  const whole = 10 * (SENT / 4);
  expect(sent.after(whole - kept - 1)).toBeNull();
  expect(sent.after(whole - kept)?.reduce((sum, chunk) => sum + chunk.length, 0)).toBe(kept);
});

test("an attachment that resumes no other counts from its own beginning", () => {
  const sent = new SentInput();
  sent.add(new Uint8Array(SENT + 1));
  sent.add(new Uint8Array(SENT + 1));
  sent.forget();
  sent.add(bytes("new"));
  expect(text(sent.after(1))).toBe("ew");
});
