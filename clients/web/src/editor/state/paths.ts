/** Workspace paths: relative, with "." for the workspace itself. */

export function parent(path: string): string {
  const at = path.lastIndexOf("/");
  return at < 0 ? "." : path.slice(0, at);
}

export function basename(path: string): string {
  return path.slice(path.lastIndexOf("/") + 1);
}

export function join(folder: string, name: string): string {
  return folder === "." ? name : `${folder}/${name}`;
}

/** Returns `path` relative to the workspace; null where it lies outside. */
export function relative(path: string, workspace: string): string | null {
  if (path === workspace) return ".";
  if (path.startsWith(`${workspace}/`)) return path.slice(workspace.length + 1);
  if (path.startsWith("/")) return null;
  return path.replace(/^(\.\/)+/, "") || ".";
}

export function within(path: string, folder: string): boolean {
  return folder === "." || path === folder || path.startsWith(`${folder}/`);
}
