/** Shows the state of the connection, in words. */

import type { LinkStatus } from "@incus-gateway/client";
import { useEffect, useState } from "preact/hooks";
import { missing } from "../state/network.js";
import { allows } from "../state/session.js";
import { type Workspace, workspace } from "../state/workspace.js";
import { Icon, Spinner } from "./parts.js";

interface Told {
  readonly tone: "good" | "busy" | "bad";
  readonly word: string;
  readonly sentence: string;
}

export function tell({ state, attempt, error }: LinkStatus): Told {
  switch (state) {
    case "open":
      return { tone: "good", word: "Connected", sentence: "Connected to the gateway." };
    case "idle":
    case "connecting":
      return { tone: "busy", word: "Connecting", sentence: "Connecting to the gateway…" };
    case "draining":
      return {
        tone: "busy",
        word: "Restarting",
        sentence: "The gateway is restarting. Running commands end with it; your text stays here.",
      };
    case "reconnecting":
      return {
        tone: attempt > 3 ? "bad" : "busy",
        word: "Reconnecting",
        sentence:
          "The connection is lost. Your text stays here, and terminals will continue where they were.",
      };
    case "offline":
      return {
        tone: "bad",
        word: "Offline",
        sentence:
          "This device is offline. Your text stays here, and terminals will continue where they were.",
      };
    case "unauthorized":
      return { tone: "bad", word: "Signed out", sentence: "The session has ended. Your text stays here." };
    case "closed":
      return { tone: "bad", word: "Closed", sentence: error?.message ?? "The connection is closed." };
  }
}

function useSeconds(until: number | null): number | null {
  const [, tick] = useState(0);
  useEffect(() => {
    if (until === null) return;
    const timer = setInterval(() => tick((count) => count + 1), 500);
    return () => clearInterval(timer);
  }, [until]);
  return until === null ? null : Math.max(0, Math.ceil((until - Date.now()) / 1000));
}

export function Connection() {
  const status = workspace.value?.status.value;
  if (status === undefined) return null;
  const { tone, word } = tell(status);
  const latency =
    status.state === "open" && status.latency !== null
      ? `${Math.max(1, Math.round(status.latency))} ms`
      : null;
  return (
    <output class={`connection ${tone}`} aria-label={`Connection: ${word}`} data-state={status.state}>
      <span class="dot" />
      <span class="word">{word}</span>
      {latency !== null && <span class="latency">{latency}</span>}
    </output>
  );
}

/** A line over the editor of a tenant that does not run: its files are there all the same. */
export function Stopped({ current }: { current: Workspace }) {
  const info = current.info.value;
  if (info === null || info.asleep || !["stopped", "frozen", "error"].includes(info.status)) return null;
  const starting = current.starting.value;
  return (
    <div class="interruption busy" role="status">
      <Icon name="power" size={15} />
      <span>
        {current.name} is {info.status === "error" ? "broken" : info.status}: no site, no terminals. Its files
        can be read and changed.
      </span>
      {allows("deploy") ? (
        <button type="button" disabled={starting} onClick={() => void current.start()}>
          {starting ? <Spinner label="Starting" /> : "Start it"}
        </button>
      ) : (
        <span class="hint">You need a token with the scope deploy to start it.</span>
      )}
    </div>
  );
}

/** A line over everything once a part of the editor is missing: after an upgrade of the gateway, or without a network. */
export function Missing() {
  if (!missing.value) return null;
  return (
    <div class="interruption bad" role="alert">
      <Icon name="unplug" size={15} />
      <span>
        A part of the editor did not load. Load the page again: files, terminals and your text come back.
      </span>
      <button type="button" onClick={() => location.reload()}>
        Load again
      </button>
    </div>
  );
}

/** A line over the editor whenever there is no connection. */
export function Interruption() {
  const current = workspace.value;
  const status = current?.status.value;
  const seconds = useSeconds(status?.retryAt ?? null);
  if (
    current == null ||
    status === undefined ||
    ["open", "idle", "connecting", "unauthorized"].includes(status.state)
  )
    return null;
  if (status.error?.code === "unauthorized") return null; // it is asked for above
  const { tone, sentence } = tell(status);
  const wait =
    status.state !== "closed" && seconds !== null && seconds > 0 ? ` Next try in ${seconds} s.` : "";
  return (
    <div class={`interruption ${tone}`} role="alert">
      <Icon
        name={status.state === "offline" ? "wifi-off" : status.state === "draining" ? "rotate-cw" : "unplug"}
        size={15}
      />
      <span>
        {sentence}
        {wait}
      </span>
      <button
        type="button"
        onClick={() => (status.state === "closed" ? current.reconnect() : current.tenant.retry())}
      >
        {status.state === "closed" ? "Connect again" : "Try now"}
      </button>
    </div>
  );
}
