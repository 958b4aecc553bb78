/** Finds a file's language by its name and loads its highlighter on first use. */

import { type LanguageSupport, StreamLanguage } from "@codemirror/language";
import type { Extension } from "@codemirror/state";
import { load } from "../state/network.js";

type Load = () => Promise<LanguageSupport | StreamLanguage<unknown>>;

interface Known {
  readonly name: string;
  readonly load: Load;
}

const script = (name: string, options: { jsx?: boolean; typescript?: boolean }): Known => ({
  name,
  load: async () => (await import("@codemirror/lang-javascript")).javascript(options),
});
const javascript = script("JavaScript", { jsx: true });
const typescript = script("TypeScript", { typescript: true });
const tsx = script("TypeScript JSX", { jsx: true, typescript: true });
const html = { name: "HTML", load: async () => (await import("@codemirror/lang-html")).html() };
const css = { name: "CSS", load: async () => (await import("@codemirror/lang-css")).css() };
const json = { name: "JSON", load: async () => (await import("@codemirror/lang-json")).json() };
const yaml = { name: "YAML", load: async () => (await import("@codemirror/lang-yaml")).yaml() };
const xml = { name: "XML", load: async () => (await import("@codemirror/lang-xml")).xml() };
const python = { name: "Python", load: async () => (await import("@codemirror/lang-python")).python() };
const markdown = {
  name: "Markdown",
  load: async () => {
    const [{ markdown }, { javascript }, { bounded }] = await Promise.all([
      import("@codemirror/lang-markdown"),
      import("@codemirror/lang-javascript"),
      import("./markdown.js"),
    ]);
    return markdown({
      defaultCodeLanguage: javascript({ jsx: true, typescript: true }),
      extensions: bounded,
    });
  },
};
const shell = {
  name: "Shell",
  load: async () => StreamLanguage.define((await import("@codemirror/legacy-modes/mode/shell")).shell),
};
const toml = {
  name: "TOML",
  load: async () => StreamLanguage.define((await import("@codemirror/legacy-modes/mode/toml")).toml),
};
const dockerfile = {
  name: "Dockerfile",
  load: async () =>
    StreamLanguage.define((await import("@codemirror/legacy-modes/mode/dockerfile")).dockerFile),
};
const nginx = {
  name: "nginx",
  load: async () => StreamLanguage.define((await import("@codemirror/legacy-modes/mode/nginx")).nginx),
};
const properties = {
  name: "Properties",
  load: async () =>
    StreamLanguage.define((await import("@codemirror/legacy-modes/mode/properties")).properties),
};

const BY_EXTENSION: Readonly<Record<string, Known>> = {
  js: javascript,
  mjs: javascript,
  cjs: javascript,
  jsx: javascript,
  ts: typescript,
  mts: typescript,
  cts: typescript,
  tsx,
  html,
  htm: html,
  vue: html,
  svelte: html,
  astro: html,
  css,
  scss: css,
  less: css,
  json,
  jsonc: json,
  map: json,
  webmanifest: json,
  md: markdown,
  mdx: markdown,
  yml: yaml,
  yaml,
  xml,
  svg: xml,
  rss: xml,
  py: python,
  sh: shell,
  bash: shell,
  zsh: shell,
  toml,
  ini: properties,
  env: properties,
  conf: nginx,
  service: properties,
  sql: { name: "SQL", load: async () => (await import("@codemirror/lang-sql")).sql() },
  php: { name: "PHP", load: async () => (await import("@codemirror/lang-php")).php() },
  rs: { name: "Rust", load: async () => (await import("@codemirror/lang-rust")).rust() },
  go: { name: "Go", load: async () => (await import("@codemirror/lang-go")).go() },
};

const BY_NAME: Readonly<Record<string, Known>> = {
  Dockerfile: dockerfile,
  Caddyfile: nginx,
  ".env": properties,
  ".gitignore": properties,
  ".bashrc": shell,
  ".profile": shell,
};

export function languageOf(path: string): Known | null {
  const name = path.slice(path.lastIndexOf("/") + 1);
  const extension = name.slice(name.lastIndexOf(".") + 1).toLowerCase();
  return (
    BY_NAME[name] ?? (name.startsWith(".env") ? properties : undefined) ?? BY_EXTENSION[extension] ?? null
  );
}

/** Returns what colours a file; nothing for an unknown language, and for one that did not load. */
export async function supportOf(path: string): Promise<Extension> {
  const known = languageOf(path);
  return known === null ? [] : load(known.load).catch(() => []);
}
