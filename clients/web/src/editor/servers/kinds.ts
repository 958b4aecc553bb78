/** What has to be installed for each language server, and what it is told of the editor. */

import type { Kind } from "./served.js";
import typescript from "./typescript/package.json?raw";
import lockOfTypescript from "./typescript/package-lock.json?raw";
import vscode from "./vscode/package.json?raw";
import lockOfVscode from "./vscode/package-lock.json?raw";

/** What has to be installed for a server that the site does not have. */
export interface Packages {
  /** Where, below the home folder; another version goes elsewhere. */
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
 * What a server is answered if it asks for settings. Completions of what is not imported yet are off: to know them
 * TypeScript reads all installed packages, which takes it from 140 to 400 MB on a template's site.
 */
const SCRIPTS = {
  suggest: { autoImports: false },
  preferences: { includeCompletionsForModuleExports: false },
  format: { semicolons: "ignore" },
};
// Tailwind's own rules are no mistakes
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
