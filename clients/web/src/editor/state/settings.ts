/** What a person likes: kept in this browser, for all tenants. */

import { effect } from "@preact/signals";
import { remembered } from "./layout.js";

export const codeSize = remembered<number>("codeSize", 13);
export const wrap = remembered<boolean>("wrap", false);
export const tabWidth = remembered<number>("tabWidth", 4);
/** Save by itself once nobody types for a second. */
export const autosave = remembered<boolean>("autosave", false);

/** Help by language servers, which run in the tenant while files that have one are open. */
export const languageServers = remembered<boolean>("languageServers", true);
/** Have a file formatted before it is saved by hand. */
export const formatOnSave = remembered<boolean>("formatOnSave", false);
/** Whose keys the text has. */
export const keys = remembered<Keys>("keys", "default");

export type Keys = "default" | "vim";
export const KEYS: readonly Keys[] = ["default", "vim"];
export const CODE_SIZES = [11, 12, 13, 14, 15, 16, 18, 20];
export const TAB_WIDTHS = [2, 4, 8];

effect(() => {
  const size = CODE_SIZES.includes(codeSize.value) ? codeSize.value : 13;
  document.documentElement.style.setProperty("--code-size", `${size}px`);
});
