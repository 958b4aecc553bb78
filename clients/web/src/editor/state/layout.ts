/** The window's layout, and which part of it is remembered. */

import { effect, type Signal, signal } from "@preact/signals";

export type SideView = "files" | "search" | "activity" | "history" | "deploy" | "insights" | "agent";
export type Area = "side" | "editor" | "panel" | "preview";
export type Theme = "system" | "light" | "dark";

/** A signal whose value outlives the page. What is in storage is not trusted to be of the right kind. */
export function remembered<Value extends string | number | boolean>(
  name: string,
  initial: Value,
): Signal<Value> {
  const key = `gateway.${name}`;
  let value = initial;
  try {
    const kept: unknown = JSON.parse(localStorage.getItem(key) ?? "null");
    if (typeof kept === typeof initial) value = kept as Value;
  } catch {
    // storage is full, forbidden or broken: the window still works
  }
  const made = signal(value);
  effect(() => {
    try {
      localStorage.setItem(key, JSON.stringify(made.value));
    } catch {
      // as above
    }
  });
  return made;
}

const wide = window.matchMedia("(min-width: 1180px)").matches;

export const sideView = remembered<SideView>("side", "files");
export const sideOpen = remembered<boolean>("sideOpen", true);
export const sideWidth = remembered<number>("sideWidth", 264);
export const panelOpen = remembered<boolean>("panelOpen", true);
export const panelHeight = remembered<number>("panelHeight", 232);
export const previewOpen = remembered<boolean>("previewOpen", wide);
export const previewWidth = remembered<number>("previewWidth", 420);
export const theme = remembered<Theme>("theme", "system");
/** Which one is shown where only one fits. */
export const area = signal<Area>("side");

export const phone = signal(false);
export const dark = signal(false);

const narrow = window.matchMedia("(max-width: 720px)");
const darkness = window.matchMedia("(prefers-color-scheme: dark)");

function follow(query: MediaQueryList, look: () => void): void {
  query.addEventListener("change", look);
  look();
}

follow(narrow, () => {
  phone.value = narrow.matches;
});
const systemDark = signal(false);
follow(darkness, () => {
  systemDark.value = darkness.matches;
});
effect(() => {
  dark.value = theme.value === "dark" || (theme.value === "system" && systemDark.value);
  document.documentElement.dataset.theme = dark.value ? "dark" : "light";
});

export function flip(which: Signal<boolean>): void {
  which.value = !which.value;
}

export function showSide(view: SideView): void {
  sideView.value = view;
  sideOpen.value = true;
  area.value = "side";
}

/** As a rail does: a second press of what is shown hides it. */
export function toggleSide(view: SideView): void {
  if (!phone.value && sideOpen.value && sideView.value === view) sideOpen.value = false;
  else showSide(view);
}

export function nextTheme(): void {
  theme.value = theme.value === "system" ? "light" : theme.value === "light" ? "dark" : "system";
}
