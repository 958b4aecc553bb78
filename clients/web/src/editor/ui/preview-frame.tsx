/** The frame of the preview: waits for the site, and receives the reports of a page with the script. */

import { useEffect, useRef, useState } from "preact/hooks";
import { remembered } from "../state/layout.js";
import { Pages, type Report, reported } from "../state/preview.js";
import { allows, session } from "../state/session.js";
import type { Workspace } from "../state/workspace.js";
import { Empty, Spinner } from "./parts.js";

/** Sizes for the frame: those of devices, in CSS pixels. */
export const DEVICES: Readonly<Record<string, { readonly width: number; readonly height: number } | null>> = {
  Responsive: null,
  Phone: { width: 390, height: 844 },
  Tablet: { width: 820, height: 1180 },
  Laptop: { width: 1366, height: 768 },
};
export const device = remembered<string>("device", "Responsive");

/** Milliseconds between two checks of a site that does not answer. */
const PERIOD = 1000;
/** Milliseconds after which a page is shown although it is still loading. */
const PATIENCE = 10_000;

type Shown =
  | { readonly is: "asking" | "waiting" }
  | { readonly is: "loading" | "there"; readonly round: number; readonly src: string };

/**
 * Shows the site once it answers. The contents of a frame of another origin cannot be read, so the gateway is asked:
 * before the frame is created, and after each page that it has loaded, which may be a proxy's error.
 */
export function Frame(props: {
  current: Workspace;
  url: string;
  asked: boolean;
  count: number;
  inspected: { readonly parameter: string; readonly key: string } | null;
  hear: (report: Report) => void;
  hush: () => void;
}) {
  const { current, url, asked, count, inspected, hear, hush } = props;
  const [shown, setShown] = useState<Shown>({ is: "asking" });
  const [again, askAgain] = useState(0);
  const status = current.info.value?.status;
  useEffect(() => {
    const ending = new AbortController();
    const { signal } = ending;
    void (async () => {
      if (asked) {
        setShown({ is: "asking" });
        while (!signal.aborted && !(await answers(current, signal))) {
          if (!signal.aborted) setShown({ is: "waiting" });
          await pause(signal);
        }
      }
      const src = inspected === null ? url : withKey(url, inspected);
      if (!signal.aborted) setShown({ is: "loading", round: ++rounds, src });
    })();
    return () => ending.abort();
  }, [current, url, asked, count, again, status, inspected]);
  const round = "round" in shown ? shown.round : 0;
  useEffect(() => {
    if (shown.is !== "loading") return;
    const timer = setTimeout(() => setShown({ ...shown, is: "there" }), PATIENCE);
    return () => clearTimeout(timer);
  }, [shown.is, round]);
  const frame = useRef<HTMLIFrameElement>(null);
  const pages = useHearing(frame, inspected === null ? null : new URL(url).origin, hear);
  const loaded = async () => {
    if (shown.is === "loading") setShown({ ...shown, is: "there" });
    const page = await pages.current?.loaded();
    if (page === "silent") hush();
    if (page instanceof URL && inspected !== null && frame.current !== null)
      frame.current.src = withKey(page.href, inspected);
    if (asked && !(await answers(current))) askAgain((before) => before + 1);
  };
  const host = useRef<HTMLDivElement>(null);
  const [room, setRoom] = useState({ width: 1, height: 1 });
  useEffect(() => {
    const element = host.current;
    if (element === null) return;
    const observer = new ResizeObserver(() =>
      setRoom({ width: element.clientWidth, height: element.clientHeight }),
    );
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  const size = DEVICES[device.value] ?? null;
  const scale = size === null ? 1 : Math.min(1, room.width / size.width, room.height / size.height);
  const shape =
    size === null
      ? undefined
      : {
          width: `${size.width}px`,
          height: `${size.height}px`,
          flex: "none",
          transform: `scale(${scale})`,
          transformOrigin: "0 0",
          marginLeft: `${Math.max(0, (room.width - size.width * scale) / 2)}px`,
        };
  return (
    <div class="site" ref={host} aria-busy={shown.is !== "there"}>
      {"round" in shown && (
        <iframe
          key={round}
          ref={frame}
          title={`Site of ${current.name}`}
          src={shown.src}
          style={shape}
          sandbox="allow-scripts allow-same-origin allow-forms allow-modals allow-popups allow-downloads"
          referrerpolicy="no-referrer"
          onLoad={() => void loaded()}
        />
      )}
      {shown.is !== "there" && (
        <div class="site-state">
          {shown.is === "waiting" ? <Waiting current={current} /> : <Spinner label="Loading the site" />}
        </div>
      )}
    </div>
  );
}

let rounds = 0;

function withKey(url: string, { parameter, key }: { parameter: string; key: string }): string {
  const address = new URL(url);
  address.search += `${address.search === "" ? "?" : "&"}${parameter}=${key}`;
  return address.href;
}

/** Receives the reports of a frame's pages. Returns what each page is that has loaded, once one is inspected. */
function useHearing(
  frame: { readonly current: HTMLIFrameElement | null },
  site: string | null,
  hear: (report: Report) => void,
): { readonly current: Pages | null } {
  const pages = useRef<Pages | null>(null);
  useEffect(() => {
    if (site === null) return;
    const its = new Pages();
    pages.current = its;
    const listen = ({ source, origin, data }: MessageEvent) => {
      // a page that the next one has replaced by now has no window any more; it may have said where it goes
      const gone = source === null;
      if (origin !== site || !(gone || source === frame.current?.contentWindow)) return;
      const report = reported(data, site);
      if (report === null || (gone && report.kind !== "going")) return;
      if (its.hear(report)) hear(report);
    };
    addEventListener("message", listen);
    return () => {
      removeEventListener("message", listen);
      pages.current = null;
    };
  }, [site, frame, hear]);
  return pages;
}

/** Whether there is something to show: a page, even the site's own error, or a site to wake. */
async function answers(current: Workspace, signal?: AbortSignal): Promise<boolean> {
  if (!session.value) return false;
  try {
    const said = await current.tenant.site(signal);
    return said.answers !== false || said.status !== null;
  } catch {
    return false; // the connection's state says why
  }
}

function Waiting({ current }: { current: Workspace }) {
  const info = current.info.value;
  if (info !== null && (info.status === "stopped" || info.status === "frozen")) {
    return (
      <Empty icon="power" title={`The tenant is ${info.status}`}>
        Its site is shown as soon as it runs.
        {allows("deploy") && (
          <button type="button" disabled={current.starting.value} onClick={() => void current.start()}>
            Start the tenant
          </button>
        )}
      </Empty>
    );
  }
  return (
    <div class="empty" role="status">
      <Spinner label="Starting" />
      <strong>Starting…</strong>
      <div>
        The site does not answer yet. It is shown as soon as it does; its log is under Metrics and logs.
      </div>
    </div>
  );
}

function pause(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, PERIOD);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
}
