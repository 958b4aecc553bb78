/** The TypeScript end of the wire against the examples that the Python end is tested with too. */

import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { ERROR_CODES, refusal } from "../src/errors.js";
import {
  cancelRequest,
  decodeServerText,
  EventParser,
  packFrame,
  request,
  unpackFrame,
} from "../src/wire.js";

interface Examples {
  frames: { stream: number; channel: number; data: string; frame: string }[];
  notFrames: string[];
  requests: { id: number | string; method: string; params: object; message: object }[];
  cancel: { id: number; message: object };
  replies: { text: string; id: number | string | null; result?: unknown; error?: object }[];
  notifications: { text: string; method: string; params: object }[];
  notGateway: string[];
  errors: { code: string; number: number; status: number }[];
  eventStreams: { chunks: string[]; events: object[] }[];
}
const examples = JSON.parse(
  readFileSync(new URL("../../../tests/wire/examples.json", import.meta.url), "utf8"),
) as Examples;
const bytes = (text: string) => Uint8Array.from(Buffer.from(text, "hex"));

describe("gateway.v1", () => {
  test.each(examples.frames)("frame $frame", ({ stream, channel, data, frame }) => {
    expect(packFrame(stream, channel, bytes(data))).toEqual(bytes(frame));
    expect(unpackFrame(bytes(frame))).toEqual({ stream, channel, data: bytes(data) });
  });

  test.each(examples.notFrames)("'%s' is no frame", (text) => {
    expect(() => unpackFrame(bytes(text))).toThrow(expect.objectContaining({ code: "invalid_params" }));
  });

  test.each(examples.requests)("request $method", ({ id, method, params, message }) => {
    expect(JSON.parse(request(id, method, params))).toEqual(message);
  });

  test("a call is cancelled by a notification", () => {
    expect(JSON.parse(cancelRequest(examples.cancel.id))).toEqual(examples.cancel.message);
  });

  test.each(examples.replies)("reply $id", ({ text, ...reply }) => {
    expect(decodeServerText(text)).toEqual({ kind: "reply", ...reply });
  });

  test.each(examples.notifications)("notification $method", ({ text, ...notification }) => {
    expect(decodeServerText(text)).toEqual({ kind: "notification", ...notification });
  });

  test.each(examples.notGateway)("'%s' is not gateway.v1", (text) => {
    expect(() => decodeServerText(text)).toThrow(expect.objectContaining({ code: "invalid_params" }));
  });

  test("every error code is known", () => {
    expect(ERROR_CODES).toEqual(examples.errors.map(({ code }) => code));
  });

  test.each(examples.errors)("problem+json of $code keeps its code and facts", ({ code, status }) => {
    const body = { type: "about:blank", title: code, status, detail: "why", code, etag: "e" };
    const error = refusal(status, JSON.stringify(body));
    expect(error).toMatchObject({ code, message: "why", facts: { etag: "e" } });
  });

  test("a proxy's own page is told by its status", () => {
    expect(refusal(502, "<html>").code).toBe("unavailable");
    expect(refusal(401, "").code).toBe("unauthorized");
  });

  test.each(examples.eventStreams)("event stream $chunks", ({ chunks, events }) => {
    const parser = new EventParser();
    expect(chunks.flatMap((chunk) => parser.feed(chunk))).toEqual(events);
  });

  test("an event stream is the same however it is cut", () => {
    for (const { chunks, events } of examples.eventStreams) {
      const parser = new EventParser();
      expect([...chunks.join("")].flatMap((char) => parser.feed(char))).toEqual(events);
    }
  });
});
