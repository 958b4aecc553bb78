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

// biome-ignore lint/suspicious/noControlCharactersInRegex: a terminal's sequences begin with one
const ANSI = /\x1b(?:\[([0-?]*)[ -/]*([@-~])|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-OQ-WYZ\\`-~])/g;
/** A terminal's eight colours; black and white are the page's own. */
const COLOURS = ["", ..."red green yellow blue magenta cyan".split(" ").map((name) => `ansi-${name}`), ""];
/** The most changes of colour in one text. */
const CHANGES = 200;

/** Returns a program's text without a terminal's sequences. */
export function plain(text: string): string {
  return text.replace(ANSI, "");
}

/** A program's text in the colours that it gives it in a terminal, as far as the page has these. */
export function Coloured({ text }: { text: string }) {
  if (!text.includes("\x1b")) return <>{text}</>;
  const parts: ComponentChildren[] = [];
  let look = PLAIN;
  let at = 0;
  const add = (shown: string) => {
    if (shown === "") return;
    parts.push(
      <span key={at} class={`${look.colour}${look.bold ? " bold" : ""}`}>
        {shown}
      </span>,
    );
  };
  for (const found of text.matchAll(ANSI)) {
    if (parts.length === CHANGES - 1) break;
    add(text.slice(at, found.index));
    at = found.index + found[0].length;
    const codes = found[1] ?? "";
    if (found[2] === "m" && !/[<-?]/.test(codes)) look = rendition(look, codes.split(/[;:]/).map(Number));
  }
  add(plain(text.slice(at)));
  return <>{parts}</>;
}

interface Rendition {
  readonly colour: string;
  readonly bold: boolean;
}

const PLAIN: Rendition = { colour: "", bold: false };

/** Returns how a text looks after a sequence that changes that. */
function rendition({ colour, bold }: Rendition, codes: readonly number[]): Rendition {
  for (let at = 0; at < codes.length; at++) {
    const code = codes[at] ?? 0;
    if (code === 0) [colour, bold] = ["", false];
    else if (code === 1 || code === 22) bold = code === 1;
    else if (code === 2 || code === 90) colour = "ansi-grey";
    else if (code === 39) colour = "";
    else if (code === 38 || code === 48) {
      const [kind, ...rest] = codes.slice(at + 1);
      if (code === 38) colour = nearest(kind === 5 ? cube(rest[0] ?? 0) : rest.slice(0, 3));
      at += kind === 5 ? 2 : 4;
    } else if ((code >= 30 && code < 38) || (code > 90 && code < 98)) colour = COLOURS[code % 10] ?? "";
    // what is faint ends where bold does
    if (code === 22 && colour === "ansi-grey") colour = "";
  }
  return { colour, bold };
}

/** Returns red, green and blue of one of a terminal's 256 colours. */
function cube(number: number): readonly number[] {
  if (number >= 232) return Array(3).fill((number - 232) * 10 + 8);
  if (number >= 16) return [36, 6, 1].map((size) => (Math.floor((number - 16) / size) % 6) * 51);
  const full = number === 8 ? [1, 1, 1] : [1, 2, 4].map((bit) => (number & bit) / bit);
  return full.map((part) => part * 200);
}

/** Returns the class of the page's colour that is nearest: its own are legible, light or dark. */
function nearest(colour: readonly number[]): string {
  const [least, most] = [Math.min(...colour), Math.max(...colour)];
  if (most - least < 60) return most > 180 ? "" : "ansi-grey";
  const bits = colour.map((part, bit) => (part > (least + most) / 2 ? 1 << bit : 0));
  return COLOURS[bits.reduce((sum, bit) => sum + bit, 0)] ?? "";
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
