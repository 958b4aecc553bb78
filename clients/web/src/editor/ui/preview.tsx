/** Knows the frame that shows the tenant's site, which is another origin and stays one. */

import { signal } from "@preact/signals";
import { useEffect, useRef, useState } from "preact/hooks";
import { previewOpen } from "../state/layout.js";
import type { Workspace } from "../state/workspace.js";
import { Empty, Icon, IconButton } from "./parts.js";

/** Grows whenever the site is to be loaded again. */
export const reloads = signal(0);

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
  const frame = useRef<HTMLIFrameElement>(null);
  const url = base === null ? null : new URL(path, base).href;
  const count = reloads.value;
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
        {url !== null && (
          <a
            class="icon-button"
            href={url}
            target="_blank"
            rel="noreferrer"
            aria-label="Open in a tab of its own"
            title="Open in a tab of its own"
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
        <iframe
          key={`${url} ${count}`}
          ref={frame}
          title={`Site of ${current.name}`}
          src={url}
          sandbox="allow-scripts allow-same-origin allow-forms allow-modals allow-popups allow-downloads"
          referrerpolicy="no-referrer"
        />
      )}
    </section>
  );
}
