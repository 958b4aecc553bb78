/** What each language server needs installed, and the settings that it gets. */

import type { Kind } from "./served.js";
import typescript from "./typescript/package.json?raw";
import lockOfTypescript from "./typescript/package-lock.json?raw";
import vscode from "./vscode/package.json?raw";
import lockOfVscode from "./vscode/package-lock.json?raw";

/** What to install for a server that the site does not have. */
export interface Packages {
  /** The folder below the home; each version has its own. */
  readonly folder: string;
  readonly manifest: string;
  readonly lock: string;
  readonly size: string;
}

const FOLDER = ".cache/incus-gateway/language-servers";

function packages(name: string, manifest: string, lock: string, size: string): Packages {
  const [version] = Object.values((JSON.parse(manifest) as { dependencies: object }).dependencies);
  return { folder: `${FOLDER}/${name}-${version}`, manifest, lock, size };
}

const VSCODE = packages("vscode", vscode, lockOfVscode, "96 MB");

export const PACKAGES: Readonly<Record<Kind, Packages>> = {
  typescript: packages("typescript", typescript, lockOfTypescript, "27 MB"),
  css: VSCODE,
  html: VSCODE,
  json: VSCODE,
};

/**
 * The settings that a server gets if it asks. Completions of names that are not imported yet are off: for them
 * TypeScript reads all installed packages, which takes 400 instead of 140 MB on a template's site.
 */
const SCRIPTS = {
  suggest: { autoImports: false },
  preferences: { includeCompletionsForModuleExports: false },
  format: { semicolons: "ignore" },
};
// do not report Tailwind's own rules
const SHEETS = { validate: true, lint: { unknownAtRules: "ignore" } };
export const SETTINGS: Readonly<Record<string, object>> = {
  "js/ts": SCRIPTS,
  typescript: SCRIPTS,
  javascript: SCRIPTS,
  css: SHEETS,
  scss: SHEETS,
  less: SHEETS,
  html: { validate: { scripts: true, styles: true } },
  json: { validate: { enable: true }, format: { enable: true } },
};

export const INITIALIZATION: Readonly<Record<Kind, object>> = {
  typescript: {},
  css: { provideFormatter: true },
  html: { provideFormatter: true, embeddedLanguages: { css: true, javascript: true } },
  json: { provideFormatter: true, handledSchemaProtocols: ["file"] },
};
