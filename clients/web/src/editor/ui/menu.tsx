/** A context menu: by the right button, or by the key for it. */

import { signal } from "@preact/signals";
import { useLayoutEffect, useRef } from "preact/hooks";
import type { IconName } from "./icons.js";
import { Icon } from "./parts.js";

export interface MenuItem {
  readonly label: string;
  readonly icon: IconName;
  readonly danger?: boolean;
  run(): void;
}

const shown = signal<{
  readonly x: number;
  readonly y: number;
  readonly label: string;
  readonly items: readonly MenuItem[];
} | null>(null);

/** Shows a menu where the event was; by the key it is at the element itself. */
export function showMenu(event: MouseEvent, label: string, items: readonly MenuItem[]): void {
  event.preventDefault();
  if (items.length === 0) return;
  const element = event.currentTarget as HTMLElement;
  const place = element.getBoundingClientRect();
  const byKey = event.clientX === 0 && event.clientY === 0;
  shown.value = {
    label,
    items,
    x: byKey ? place.left + 24 : event.clientX,
    y: byKey ? place.top + 24 : event.clientY,
  };
}

/** Shows a menu below a button, once it is known what is in it. */
export function showMenuBelow(button: HTMLElement, label: string, items: readonly MenuItem[]): void {
  const { left, bottom } = button.getBoundingClientRect();
  shown.value = { label, items, x: left, y: bottom + 4 };
}

export function Menu() {
  const menu = shown.value;
  const element = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const box = element.current;
    if (menu === null || box === null) return;
    const before = document.activeElement;
    box.style.left = `${Math.max(4, Math.min(menu.x, innerWidth - box.offsetWidth - 4))}px`;
    box.style.top = `${Math.max(4, Math.min(menu.y, innerHeight - box.offsetHeight - 4))}px`;
    box.querySelector("button")?.focus();
    const away = (event: Event) => {
      // the window itself loses the focus to a frame
      if (!(event.target instanceof Node && box.contains(event.target))) shown.value = null;
    };
    addEventListener("pointerdown", away, true);
    addEventListener("blur", away);
    return () => {
      removeEventListener("pointerdown", away, true);
      removeEventListener("blur", away);
      // an item that was run has taken the focus to where it belongs
      if (document.activeElement === document.body && before instanceof HTMLElement) before.focus();
    };
  }, [menu]);
  if (menu === null) return null;
  const close = () => {
    shown.value = null;
  };
  const step = (by: number) => {
    const buttons = [...(element.current?.querySelectorAll("button") ?? [])];
    const at = buttons.indexOf(document.activeElement as HTMLButtonElement);
    buttons[(at + by + buttons.length) % buttons.length]?.focus();
  };
  return (
    <div
      ref={element}
      class="menu"
      role="menu"
      tabIndex={-1}
      aria-label={menu.label}
      onContextMenu={(event) => event.preventDefault()}
      onKeyDown={(event) => {
        const acts: Record<string, () => void> = {
          ArrowDown: () => step(1),
          ArrowUp: () => step(-1),
          Escape: close,
          Tab: close,
        };
        const act = acts[event.key];
        if (act === undefined) return;
        event.preventDefault();
        event.stopPropagation();
        act();
      }}
    >
      {menu.items.map((item) => (
        <button
          type="button"
          role="menuitem"
          key={item.label}
          class={item.danger ? "danger" : ""}
          onClick={() => {
            close();
            queueMicrotask(() => item.run());
          }}
        >
          <Icon name={item.icon} size={14} />
          {item.label}
        </button>
      ))}
    </div>
  );
}
