/** The preview: a frame with the tenant's site, on the site's own origin. */

import { GatewayError } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { previewOpen } from "../state/layout.js";
import { here, type Line, NOWHERE, type Report, step, told, type Visited, visit } from "../state/preview.js";
import { gateway } from "../state/session.js";
import { complain } from "../state/toasts.js";
import type { Workspace } from "../state/workspace.js";
import { type MenuItem, showMenu, showMenuBelow } from "./menu.js";
import { Empty, Icon, IconButton } from "./parts.js";
import { PreviewConsole } from "./preview-console.js";
import { DEVICES, device, Frame } from "./preview-frame.js";

/** Increased to load the site again. */
export const reloads = signal(0);

export function siteOf(current: Workspace): string | null {
  const info = current.info.value;
  if (info === null) return null;
  if (info.url !== null) return info.url;
  return info.address !== null && info.port !== null ? `http://${info.address}:${info.port}` : null;
}

/** The parameter that adds the script, which reports errors, to the site's pages. */
interface Key {
  readonly parameter: string;
  readonly key: string;
}

export function Preview({ current }: { current: Workspace }) {
  const site = siteOf(current);
  const kept = `gateway.preview.${current.name}`;
  const [chosen, setChosen] = useState<string | null>(() => localStorage.getItem(kept));
  const base = chosen ?? site;
  const [visited, setVisited] = useState<Visited>(NOWHERE);
  /** The address that the frame loads first; its page may have moved on since. */
  const [load, setLoad] = useState<string | null>(null);
  /** The text typed into the address field, or null. */
  const [typed, setTyped] = useState<string | null>(null);
  const field = useRef<HTMLInputElement>(null);
  const [key, setKey] = useState<Key | null>(null);
  const [lines, setLines] = useState<readonly Line[]>([]);
  const url = here(visited) ?? (base === null ? null : new URL("/", base).href);
  const own = url !== null && site !== null && new URL(url).origin === new URL(site).origin;
  // do not lose what is being typed if an address becomes known or the page moves on
  useEffect(() => {
    if (document.activeElement !== field.current) setTyped(null);
  }, [url]);
  const count = reloads.value;
  // reload the shown page, wherever its links have led
  useEffect(() => setLoad(here(visited)), [count]);
  const choose = (origin: string | null) => {
    if (origin === null || origin === (site === null ? null : new URL(site).origin))
      localStorage.removeItem(kept);
    else localStorage.setItem(kept, origin);
    setChosen(localStorage.getItem(kept));
  };
  const open = (wanted: string, from: Visited = visited) => {
    const address = new URL(wanted);
    if (address.origin === location.origin) return;
    choose(address.origin);
    setVisited(url === null ? visit(from, address.href) : visit(visit(from, url), address.href));
    setLoad(address.href);
    reloads.value += 1; // it may be what was asked for last, before a link led elsewhere
  };
  /** What opens a page as things are by then: a menu waits for its items, and for a choice. */
  const opens = useRef(open);
  opens.current = open;
  const go = (event: Event) => {
    event.preventDefault();
    const text = (typed ?? url ?? "").trim();
    if (text === "") {
      setTyped(null);
      choose(null);
      setVisited(NOWHERE);
      setLoad(null);
      return;
    }
    if (text.startsWith("/") && url === null) return; // the site is not known yet
    const whole = text.startsWith("/") ? new URL(text, url ?? undefined).href : text;
    const wanted = /^https?:\/\//.test(whole) ? whole : `http://${whole}`;
    setTyped(null);
    if (URL.canParse(wanted)) open(wanted);
  };
  const move = (by: number) => {
    const next = step(visited, by);
    const address = here(next);
    if (address === null) return;
    choose(new URL(address).origin);
    setVisited(next);
    setLoad(address);
    reloads.value += 1;
  };
  const hear = useCallback(({ kind, text, url: at }: Report) => {
    if (kind === "page") setLines([]);
    if (kind === "page" || kind === "moved") setVisited((before) => visit(before, at));
    if (kind === "error" || kind === "warning") setLines((before) => told(before, kind, text));
  }, []);
  const hush = useCallback(() => {
    const why =
      "This page reports nothing: its Content-Security-Policy refuses the script, or it is not a page of the site.";
    setLines((before) => told(before, "note", why));
  }, []);
  const inspect = async () => {
    setLines([]);
    if (key !== null) {
      setKey(null);
      return;
    }
    try {
      setKey(await gateway.json<Key>("POST", `/v1/tenants/${current.name}/preview`));
    } catch (error) {
      complain(error, "The page's console");
    }
  };
  return (
    <section class="preview" aria-label="Preview of the site">
      <header>
        <IconButton
          icon="arrow-left"
          label="Back"
          size={14}
          disabled={visited.at < 1}
          onClick={() => move(-1)}
        />
        <IconButton
          icon="arrow-right"
          label="Forward"
          size={14}
          disabled={visited.at >= visited.entries.length - 1}
          onClick={() => move(1)}
        />
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
            ref={field}
            value={typed ?? url ?? ""}
            onKeyDown={(event) => {
              if (event.key === "Escape") setTyped(null);
            }}
            onInput={(event) => setTyped(event.currentTarget.value)}
            onFocus={(event) => event.currentTarget.select()}
          />
        </form>
        <IconButton
          icon="radio"
          label="Ports that listen"
          size={14}
          onClick={({ currentTarget }) =>
            void listening(currentTarget as HTMLElement, current, (url) => opens.current(url))
          }
        />
        <IconButton
          icon="scroll-text"
          label={key === null ? "Show the page's errors" : "Hide the page's errors"}
          size={14}
          pressed={key !== null}
          onClick={() => void inspect()}
        />
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
        <Frame
          key={current.name}
          current={current}
          url={load ?? new URL("/", base ?? url).href}
          asked={own}
          count={count}
          inspected={own ? key : null}
          hear={hear}
          hush={hush}
        />
      )}
      {key !== null && url !== null && <PreviewConsole lines={lines} clear={() => setLines([])} />}
    </section>
  );
}

const INSIDE = ["127.", "::1"];

/** Lists the listening ports of the tenant, and shows the chosen one. */
async function listening(
  button: HTMLElement,
  current: Workspace,
  open: (url: string) => void,
): Promise<void> {
  try {
    const ports = await current.tenant.ports();
    const info = current.info.value;
    const items = ports.map(({ port, address }): MenuItem => {
      const inside = INSIDE.some((begin) => address.startsWith(begin));
      const site = port === info?.port ? siteOf(current) : null;
      const reached = site ?? (info?.address == null || inside ? null : `http://${info.address}:${port}`);
      const where = site !== null ? "the site" : inside ? "only inside the tenant" : (info?.address ?? "");
      return {
        label: `${port}, ${where}`,
        icon: reached === null ? "lock" : "globe",
        run: () => reached !== null && open(reached),
      };
    });
    const none: MenuItem = { label: "Nothing listens", icon: "info", run: () => {} };
    showMenuBelow(button, "Ports that listen", items.length > 0 ? items : [none]);
  } catch (error) {
    if (!(error instanceof GatewayError && error.code === "unauthorized"))
      complain(error, "Ports that listen");
  }
}
