/** Buttons, fields, menus and other small components. */

import type { ComponentChildren } from "preact";
import { useLayoutEffect, useRef } from "preact/hooks";
import { basename } from "../state/paths.js";
import { complain, say } from "../state/toasts.js";
import { ICONS, type IconName } from "./icons.js";

export function Icon({ name, size = 16 }: { name: IconName; size?: number }) {
  const shapes: readonly (readonly [string, Readonly<Record<string, string>>])[] = ICONS[name];
  return (
    <svg
      class="icon"
      width={size}
      height={size}
      viewBox="0 0 24 24"
      fill="none"
      stroke="currentColor"
      stroke-width="1.75"
      stroke-linecap="round"
      stroke-linejoin="round"
      aria-hidden="true"
    >
      {shapes.map(([Tag, attributes], index) => {
        const Shape = Tag as "path";
        return <Shape key={index} {...attributes} />;
      })}
    </svg>
  );
}

interface ButtonProps {
  icon: IconName;
  label: string;
  keys?: string | undefined;
  onClick: (event: MouseEvent) => void;
  pressed?: boolean;
  disabled?: boolean;
  danger?: boolean;
  size?: number;
  text?: boolean;
}

export function IconButton({
  icon,
  label,
  keys,
  onClick,
  pressed,
  disabled,
  danger,
  size = 16,
  text,
}: ButtonProps) {
  return (
    <button
      type="button"
      class={`icon-button${danger ? " danger" : ""}${text ? " with-text" : ""}`}
      aria-label={label}
      title={keys === undefined ? label : `${label} (${keys})`}
      aria-pressed={pressed}
      disabled={disabled}
      onClick={onClick}
    >
      <Icon name={icon} size={size} />
      {text && <span>{label}</span>}
    </button>
  );
}

export function Empty({
  icon,
  title,
  children,
}: {
  icon: IconName;
  title: string;
  children?: ComponentChildren;
}) {
  return (
    <div class="empty">
      <Icon name={icon} size={22} />
      <strong>{title}</strong>
      {children !== undefined && <div>{children}</div>}
    </div>
  );
}

export function Spinner({ label }: { label?: string }) {
  return (
    <span class="spinner" role="status" aria-label={label ?? "Loading"}>
      <Icon name="loader-circle" size={14} />
    </span>
  );
}

/** A window over the page that takes the focus, and gives it back. */
export function Dialog(props: {
  label: string;
  class?: string;
  onClose: () => void;
  children: ComponentChildren;
  modal?: boolean;
}) {
  const element = useRef<HTMLDialogElement>(null);
  // at once: the next key is for the dialog already
  useLayoutEffect(() => {
    const before = document.activeElement;
    element.current?.showModal();
    return () => {
      if (before instanceof HTMLElement && before.isConnected) before.focus();
    };
  }, []);
  return (
    <dialog
      ref={element}
      class={props.class}
      aria-label={props.label}
      onCancel={(event: Event) => {
        event.preventDefault();
        props.onClose();
      }}
      onMouseDown={(event: MouseEvent) => {
        if (event.target === element.current) props.onClose();
      }}
    >
      {props.children}
    </dialog>
  );
}

/** A line between two parts that is drawn by pointer or by arrow keys. */
export function Divider(props: {
  label: string;
  vertical?: boolean;
  value: number;
  min: number;
  max: () => number;
  invert?: boolean;
  onChange: (value: number) => void;
}) {
  const set = (value: number) =>
    props.onChange(Math.round(Math.max(props.min, Math.min(props.max(), value))));
  const drag = (event: PointerEvent) => {
    const target = event.currentTarget as HTMLElement;
    target.setPointerCapture(event.pointerId);
    const start = props.vertical ? event.clientX : event.clientY;
    const { value } = props;
    const move = (moved: PointerEvent) => {
      const by = (props.vertical ? moved.clientX : moved.clientY) - start;
      set(value + (props.invert ? -by : by));
    };
    const end = () => {
      target.removeEventListener("pointermove", move);
      document.documentElement.classList.remove("dragging");
    };
    document.documentElement.classList.add("dragging");
    target.addEventListener("pointermove", move);
    target.addEventListener("lostpointercapture", end, { once: true });
  };
  return (
    // biome-ignore lint/a11y/useSemanticElements: an hr can take no focus and no value
    <div
      class={`divider ${props.vertical ? "vertical" : "horizontal"}`}
      role="separator"
      tabIndex={0}
      aria-label={props.label}
      aria-orientation={props.vertical ? "vertical" : "horizontal"}
      aria-valuenow={props.value}
      aria-valuemin={props.min}
      onPointerDown={drag}
      onKeyDown={(event: KeyboardEvent) => {
        const by = { ArrowLeft: -16, ArrowUp: -16, ArrowRight: 16, ArrowDown: 16 }[event.key];
        if (by === undefined) return;
        event.preventDefault();
        set(props.value + (props.invert ? -by : by));
      }}
    />
  );
}

const KINDS: readonly (readonly [RegExp, IconName, string])[] = [
  [/\.(tsx|jsx)$/, "file-code", "cyan"],
  [/\.(ts|mts|cts)$/, "file-code", "blue"],
  [/\.(js|mjs|cjs)$/, "file-code", "amber"],
  [/\.(html?|vue|svelte|astro)$/, "file-code", "coral"],
  [/\.(css|scss|less)$/, "hash", "violet"],
  [/\.(json|jsonc|webmanifest)$/, "braces", "amber"],
  [/\.(md|mdx|txt)$/, "file-text", "grey"],
  [/\.(png|jpe?g|gif|webp|avif|ico|svg)$/, "image", "green"],
  [/\.(sh|bash|zsh)$/, "square-terminal", "green"],
  [/(^|\/)(.*lock.*|.*\.lock)$/, "lock", "grey"],
];

export function FileIcon({ path, folder, open }: { path: string; folder?: boolean; open?: boolean }) {
  if (folder) {
    return (
      <span class="file-icon folder">
        <Icon name={open ? "folder-open" : "folder"} size={15} />
      </span>
    );
  }
  const name = basename(path).toLowerCase();
  const [, icon, colour] = KINDS.find(([pattern]) => pattern.test(name)) ?? [null, "file" as const, "grey"];
  return (
    <span class={`file-icon ${colour}`}>
      <Icon name={icon} size={15} />
    </span>
  );
}

/** Tenants as a sentence has them. */
export function Names({ names }: { names: readonly string[] }) {
  if (names.includes("*")) return <>every tenant</>;
  const rest = names.length - 3;
  return (
    <>
      <bdi>{names.slice(0, 3).join(", ")}</bdi>
      {rest > 0 && ` and ${rest} more`}
    </>
  );
}

/** Moves a strip of tabs by a wheel that turns up and down. */
export function scrollAcross({ currentTarget, deltaX, deltaY }: WheelEvent): void {
  if (deltaX === 0) (currentTarget as Element).scrollLeft += deltaY;
}

/** Copies a text to the clipboard, and says so. */
export function copy(text: string): void {
  navigator.clipboard
    .writeText(text)
    .then(() => say(`Copied ${text}`))
    .catch(() => complain(new Error("This browser does not allow copying."))); // over plain HTTP
}

export function Key({ children }: { children: string }) {
  return <kbd>{children}</kbd>;
}

export function bytes(value: number): string {
  if (value < 1024) return `${Math.round(value)} B`;
  const units = ["KB", "MB", "GB", "TB"];
  let at = -1;
  let size = value;
  do {
    size /= 1024;
    at += 1;
  } while (size >= 1000 && at < units.length - 1);
  return `${size < 10 ? size.toFixed(1) : Math.round(size)} ${units[at]}`;
}

export function duration(ms: number): string {
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

export function clock(at: number): string {
  return new Date(at).toLocaleTimeString(undefined, {
    hour: "2-digit",
    minute: "2-digit",
    second: "2-digit",
    hour12: false,
  });
}
