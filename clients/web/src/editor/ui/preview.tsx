/** The preview: a frame with the tenant's site, on the site's own origin. */

import { signal } from "@preact/signals";
import { useEffect, useRef, useState } from "preact/hooks";
import { previewOpen, remembered } from "../state/layout.js";
import { allows, session } from "../state/session.js";
import type { Workspace } from "../state/workspace.js";
import { showMenu } from "./menu.js";
import { Empty, Icon, IconButton, Spinner } from "./parts.js";

/** Grows whenever the site is to be loaded again. */
export const reloads = signal(0);

/** Sizes at which a site is looked at: a device's, in its own pixels. */
const DEVICES: Readonly<Record<string, { readonly width: number; readonly height: number } | null>> = {
  Fitting: null,
  Phone: { width: 390, height: 844 },
  Tablet: { width: 820, height: 1180 },
  Laptop: { width: 1366, height: 768 },
};
const device = remembered<string>("device", "Fitting");

export function siteOf(current: Workspace): string | null {
  const info = current.info.value;
  if (info === null) return null;
  if (info.url !== null) return info.url;
  return info.address !== null && info.port !== null ? `http://${info.address}:${info.port}` : null;
}

export function Preview({ current }: { current: Workspace }) {
  const site = siteOf(current);
  const key = `gateway.preview.${current.name}`;
  const [chosen, setChosen] = useState<string | null>(() => localStorage.getItem(key));
  const [path, setPath] = useState("/");
  const base = chosen ?? site;
  const [typed, setTyped] = useState("");
  const url = base === null ? null : new URL(path, base).href;
  useEffect(() => {
    setTyped(url ?? "");
  }, [url]);
  const go = (event: Event) => {
    event.preventDefault();
    const text = typed.trim();
    if (text === "") {
      localStorage.removeItem(key);
      setChosen(null);
      return;
    }
    if (text.startsWith("/") && base !== null) {
      setPath(text);
      return;
    }
    try {
      const wanted = new URL(/^https?:\/\//.test(text) ? text : `http://${text}`);
      if (wanted.origin === location.origin) return;
      if (wanted.origin !== (site === null ? null : new URL(site).origin)) {
        localStorage.setItem(key, wanted.origin);
        setChosen(wanted.origin);
      }
      setPath(wanted.pathname + wanted.search + wanted.hash);
    } catch {
      setTyped(url ?? "");
    }
  };
  return (
    <section class="preview" aria-label="Preview of the site">
      <header>
        <IconButton
          icon="rotate-cw"
          label="Reload the site"
          size={14}
          onClick={() => {
            reloads.value += 1;
          }}
        />
        <form class="field small" onSubmit={go}>
          <Icon name="globe" size={13} />
          <input
            aria-label="Address of the site"
            placeholder="The site's address"
            spellcheck={false}
            value={typed}
            onInput={(event) => setTyped(event.currentTarget.value)}
            onFocus={(event) => event.currentTarget.select()}
          />
        </form>
        <IconButton
          icon="monitor"
          label={`Size of the site: ${device.value}`}
          size={14}
          pressed={DEVICES[device.value] != null}
          onClick={(event) =>
            showMenu(
              event,
              "Size of the site",
              Object.entries(DEVICES).map(([name, size]) => ({
                label: size === null ? name : `${name}, ${size.width} × ${size.height}`,
                icon: name === device.value ? ("check" as const) : ("monitor" as const),
                run: () => {
                  device.value = name;
                },
              })),
            )
          }
        />
        {url !== null && (
          <a
            class="icon-button"
            href={url}
            target="_blank"
            rel="noreferrer"
            aria-label="Open in a new tab"
            title="Open in a new tab"
          >
            <Icon name="external-link" size={14} />
          </a>
        )}
        <IconButton
          icon="x"
          label="Hide the preview"
          size={14}
          onClick={() => {
            previewOpen.value = false;
          }}
        />
      </header>
      {url === null ? (
        <Empty icon="globe" title="No site yet">
          This tenant has no address. Deploy a template, or type the address of a server above.
        </Empty>
      ) : (
        <Frame key={current.name} current={current} url={url} asked={base === site} />
      )}
    </section>
  );
}

/** Milliseconds between two looks at a site that does not answer. */
const PERIOD = 1000;
/** After so many milliseconds a page is shown although it still loads. */
const PATIENCE = 10_000;

type Shown =
  | { readonly is: "asking" | "waiting" }
  | { readonly is: "loading" | "there"; readonly round: number };

/**
 * Shows the site once it answers. What a frame of another origin has in it nobody here can see, so that the
 * gateway is asked: before the frame is made, and after each page that it loaded, which may be a proxy's error.
 */
function Frame({ current, url, asked }: { current: Workspace; url: string; asked: boolean }) {
  const [shown, setShown] = useState<Shown>({ is: "asking" });
  const [again, askAgain] = useState(0);
  const status = current.info.value?.status;
  const count = reloads.value;
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
      if (!signal.aborted) setShown({ is: "loading", round: ++rounds });
    })();
    return () => ending.abort();
  }, [current, url, asked, count, again, status]);
  const round = "round" in shown ? shown.round : 0;
  useEffect(() => {
    if (shown.is !== "loading") return;
    const timer = setTimeout(() => setShown({ is: "there", round }), PATIENCE);
    return () => clearTimeout(timer);
  }, [shown.is, round]);
  const loaded = async () => {
    setShown({ is: "there", round });
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
          title={`Site of ${current.name}`}
          src={url}
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

/** Says whether there is something to show: a page, be it the site's own error, or one that has to be woken. */
async function answers(current: Workspace, signal?: AbortSignal): Promise<boolean> {
  if (!session.value) return false;
  try {
    const said = await current.tenant.site(signal);
    return said.answers !== false || said.status !== null;
  } catch {
    return false; // the state of the connection says why
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
