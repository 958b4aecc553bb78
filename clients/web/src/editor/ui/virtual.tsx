/** A virtual list: only visible rows of a fixed height are in the page. */

import type { ComponentChildren } from "preact";
import { useLayoutEffect, useRef, useState } from "preact/hooks";

const MORE = 8;

export function Rows<Item>(props: {
  items: readonly Item[];
  height: number;
  row: (item: Item, index: number) => ComponentChildren;
  class?: string;
  /** Keeps this one in sight. */
  show?: number;
  attributes?: Record<string, unknown>;
}) {
  const element = useRef<HTMLDivElement>(null);
  const [view, setView] = useState({ top: 0, height: 600 });
  useLayoutEffect(() => {
    const host = element.current;
    if (host === null) return;
    const look = () => setView({ top: host.scrollTop, height: host.clientHeight });
    const observer = new ResizeObserver(look);
    observer.observe(host);
    host.addEventListener("scroll", look, { passive: true });
    return () => {
      observer.disconnect();
      host.removeEventListener("scroll", look);
    };
  }, []);
  useLayoutEffect(() => {
    const host = element.current;
    if (host === null || props.show === undefined || props.show < 0) return;
    const top = props.show * props.height;
    if (top < host.scrollTop) host.scrollTop = top;
    else if (top + props.height > host.scrollTop + host.clientHeight) {
      host.scrollTop = top + props.height - host.clientHeight;
    }
  }, [props.show, props.height]);
  const first = Math.max(0, Math.floor(view.top / props.height) - MORE);
  const last = Math.min(props.items.length, Math.ceil((view.top + view.height) / props.height) + MORE);
  return (
    <div ref={element} class={`rows ${props.class ?? ""}`} {...props.attributes}>
      <div class="rows-all" style={{ height: `${props.items.length * props.height}px` }}>
        <div style={{ transform: `translateY(${first * props.height}px)` }}>
          {props.items.slice(first, last).map((item, index) => props.row(item, first + index))}
        </div>
      </div>
    </div>
  );
}
