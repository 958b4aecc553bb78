/** Starts the editor. */

import "@fontsource-variable/inter/wght.css";
import "@fontsource-variable/jetbrains-mono/wght.css";
// not with its script: a sheet that once failed is not loaded again
import "@xterm/xterm/css/xterm.css";
import "./style/base.css";
import "./style/shell.css";
import "./style/views.css";
import "./style/site.css";
import "./style/agent.css";
import "./style/servers.css";
import { effect } from "@preact/signals";
import { render } from "preact";
import { served } from "./servers/served.js";
import { agentUrl } from "./state/agent.js";
import { palette, register } from "./state/commands.js";
import { area, flip, nextTheme, panelOpen, previewOpen, showSide, sideOpen } from "./state/layout.js";
import { load, loaded } from "./state/network.js";
import {
  type Address,
  allows,
  goesPast,
  identify,
  notice,
  readAddress,
  resume,
  session,
  signIn,
  writeAddress,
} from "./state/session.js";
import { languageServers, wrap } from "./state/settings.js";
import { covers, known } from "./state/slots.js";
import { complain, say } from "./state/toasts.js";
import { leaveTenant, listTenants, openFirst, workspace } from "./state/workspace.js";
import { focusAgent } from "./ui/agent.js";
import { App } from "./ui/app.js";
import { arriving, askToSignIn } from "./ui/arrival.js";
import { closeDoc } from "./ui/editor-pane.js";
import { finding } from "./ui/panel.js";
import { reloads } from "./ui/preview.js";
import { focusSearch } from "./ui/search.js";
import { settingsOpen } from "./ui/settings.js";
import { leave, leaveFirst, switchTenant } from "./ui/top-bar.js";
import { view } from "./ui/view.js";

// first of all, so that a token does not stay in the address while anything else happens
const wanted = readAddress();

const current = () => workspace.value;
const doc = () => current()?.documents.tabs.current.value ?? null;
const here = () => current() !== null;
const file = () => doc() !== null;

register(
  {
    id: "file.save",
    title: "Save",
    keys: "Mod-s",
    when: here,
    run: () => void (doc() && current()?.save(doc()!)),
  },
  {
    id: "file.saveAll",
    title: "Save all",
    keys: "Mod-Alt-s",
    when: here,
    run: () => void current()?.documents.saveAll(),
  },
  { id: "file.open", title: "Open a file by name", keys: "Mod-p", when: here, run: () => ask("files", "") },
  { id: "palette", title: "Run a command", keys: "Mod-Shift-p", run: () => ask("commands", ">") },
  { id: "palette.f1", title: "Run a command (F1)", keys: "F1", run: () => ask("commands", ">") },
  {
    id: "file.close",
    title: "Close the file",
    keys: "Alt-w",
    when: file,
    run: () => closeDoc(current()!, doc()!),
  },
  {
    id: "terminal.next",
    title: "Next terminal",
    keys: "Alt-PageDown",
    when: atTerminal,
    run: () => stepTerminal(1),
  },
  {
    id: "terminal.previous",
    title: "Previous terminal",
    keys: "Alt-PageUp",
    when: atTerminal,
    run: () => stepTerminal(-1),
  },
  {
    id: "file.next",
    title: "Next file",
    keys: "Alt-PageDown",
    when: file,
    run: () => current()?.documents.tabs.step(1),
  },
  {
    id: "file.previous",
    title: "Previous file",
    keys: "Alt-PageUp",
    when: file,
    run: () => current()?.documents.tabs.step(-1),
  },
  {
    id: "file.beside",
    title: "Open the file beside the others, or back among them",
    keys: "Mod-Alt-b",
    when: file,
    run: () => {
      const { tabs } = current()!.documents;
      tabs.place(doc()!, tabs.beside.value === doc() ? "main" : "beside");
    },
  },
  {
    id: "file.alone",
    title: "Show one file alone",
    when: () => current()?.documents.tabs.beside.value != null,
    run: () => current()?.documents.tabs.join(),
  },
  {
    id: "text.line",
    title: "Go to a line",
    keys: "Mod-g",
    when: file,
    run: () => ask("files", ":"),
  },
  {
    id: "text.definition",
    title: "Go to the definition",
    textKeys: "F12",
    when: helped,
    run: () => press("F12"),
  },
  { id: "text.rename", title: "Rename the symbol", textKeys: "F2", when: helped, run: () => press("F2") },
  {
    id: "text.format",
    title: "Format the file",
    when: () => helped() && allows("files:write"),
    run: () => void current()?.servers.format(doc()!),
  },
  { id: "text.wrap", title: "Wrap long lines, or no longer", when: file, run: () => flip(wrap) },
  { id: "file.reveal", title: "Show the file in the tree", when: file, run: () => reveal() },
  { id: "view.files", title: "Files", keys: "Mod-Shift-e", run: () => showSide("files") },
  { id: "search", title: "Search in all files", keys: "Mod-Shift-f", when: here, run: () => find() },
  { id: "view.activity", title: "Activity", keys: "Mod-Shift-a", run: () => showSide("activity") },
  {
    id: "view.history",
    title: "History: what agents changed",
    keys: "Mod-Shift-h",
    run: () => showSide("history"),
  },
  { id: "view.deploy", title: "Deploy", keys: "Mod-Shift-d", run: () => showSide("deploy") },
  {
    id: "view.agent",
    title: "Ask the agent",
    keys: "Mod-Alt-i",
    when: () => here() && agentUrl !== null,
    run: () => {
      showSide("agent");
      focusAgent();
    },
  },
  { id: "view.insights", title: "Metrics and logs", keys: "Mod-Shift-m", run: () => showSide("insights") },
  {
    id: "side.toggle",
    title: "Show or hide the side bar",
    keys: "Mod-b",
    run: () => flip(sideOpen),
  },
  {
    id: "terminal.toggle",
    title: "Show or hide the terminals",
    keys: "Mod-`",
    when: here,
    run: () => terminal(),
  },
  {
    id: "terminal.new",
    title: "New terminal",
    keys: "Mod-Shift-`",
    when: () => here() && allows("exec"),
    run: () => newTerminal(),
  },
  {
    id: "preview.toggle",
    title: "Show or hide the preview",
    keys: "Mod-\\",
    when: here,
    run: () => flip(previewOpen),
  },
  { id: "preview.reload", title: "Reload the preview", when: here, run: () => reload() },
  {
    id: "activity.follow",
    title: "Follow the files that are written",
    when: here,
    run: () => followWritten(),
  },
  { id: "tenant.switch", title: "Open another tenant", keys: "Mod-Shift-o", run: () => switcher() },
  { id: "editor.focus", title: "Go to the editor", keys: "F6", when: file, run: () => view.current?.focus() },
  {
    id: "connection.check",
    title: "Check the connection",
    when: here,
    run: () => void current()?.tenant.check(),
  },
  {
    id: "settings",
    title: "Settings",
    keys: "Mod-,",
    run: () => {
      settingsOpen.value = true;
    },
  },
  { id: "theme", title: "Change the colours: system, light, dark", run: nextTheme },
  { id: "sign-out", title: "Sign out", run: () => void leave() },
);

function ask(mode: "files" | "commands" | "tenants", initial: string): void {
  palette.value = { mode, initial };
}

/** Whether a language server helps with the file. */
function helped(): boolean {
  const shown = doc();
  return shown !== null && languageServers.value && served(shown);
}

/** Does what a key does in the text. */
function press(key: string): void {
  const where = view.current;
  if (where === null) return;
  where.focus();
  void load(() => import("./code/editor.js")).then(
    ({ press }) =>
      press(where, key) || say("The language server has nothing to do here, or does not run yet."),
    () => {}, // `missing` is told
  );
}

function reload(): void {
  reloads.value += 1;
}

function switcher(): void {
  void listTenants();
  ask("tenants", "");
}

function reveal(): void {
  showSide("files");
  const path = doc()?.path;
  if (path !== undefined) void current()?.tree.reveal(path);
}

function find(): void {
  if (document.activeElement?.closest(".screen") != null) {
    finding.value += 1;
    return;
  }
  const state = view.current?.state;
  const selected = state?.sliceDoc(state.selection.main.from, state.selection.main.to) ?? "";
  showSide("search");
  const search = current()?.search;
  if (search !== undefined && selected !== "" && !selected.includes("\n")) {
    search.query.value = selected;
    void search.run();
  }
  focusSearch.value += 1;
}

function terminal(): void {
  const terminals = current()?.terminals;
  if (terminals === undefined) return;
  const inside = atTerminal();
  if (panelOpen.value && (inside || terminals.list.value.length > 0)) {
    if (!inside && terminals.active.value?.screen) {
      terminals.active.value.screen.focus();
      return;
    }
    panelOpen.value = false;
    view.current?.focus();
    return;
  }
  if (terminals.active.value !== null) terminals.active.value.wanted = true;
  panelOpen.value = true;
  area.value = "panel";
  if (terminals.list.value.length === 0 && allows("exec")) terminals.open(true);
}

function atTerminal(): boolean {
  return document.activeElement?.closest(".panel") != null;
}

function stepTerminal(by: number): void {
  const next = current()?.terminals.step(by);
  if (next) next.wanted = true;
}

function newTerminal(): void {
  panelOpen.value = true;
  area.value = "panel";
  current()?.terminals.open(true);
}

function followWritten(): void {
  const activity = current()?.activity;
  if (activity !== undefined) activity.follow.value = !activity.follow.value;
  showSide("activity");
}

// what is dropped beside a place for it does not take the page's place
for (const kind of ["dragover", "drop"] as const)
  addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "none";
  });

// the panel is never open and empty without need
effect(() => {
  const opened = workspace.value;
  if (
    opened?.server.value &&
    panelOpen.value &&
    allows("exec") &&
    opened.terminals.list.peek().length === 0
  ) {
    opened.terminals.open(false);
  }
});

effect(() => {
  const path = doc()?.path;
  const name = workspace.value?.name;
  document.title = [path, name, "incus-gateway"].filter(Boolean).join(" · ");
});

/** Loads what shows a file, before there is a text to show. Whoever opens it tells what did not load. */
async function prepare(path: string): Promise<void> {
  await load(() => import("./code/editor.js")).then(
    ({ supportOf }) => supportOf(path),
    () => {},
  );
}

/** Opens what the address of a page that was loaded asks for. */
async function begin(to: Address): Promise<void> {
  const own = await resume(to.tenant, to.token !== null);
  const came = to.token === null || (await arrive(to.token, own));
  if (!session.value) return;
  if (to.token !== null && came && known().length > 1)
    say(`Signed in as ${session.value.subject} in this tab, next to your other sessions.`);
  await openFirst(came ? to.tenant : null, came ? to.file : null);
}

/** Signs in by a token from the address, and asks first where that would go past another session. */
async function arrive(token: string, own: boolean): Promise<boolean> {
  arriving.value = true;
  try {
    const found = await identify(token);
    const past = goesPast(found, own);
    if (past !== null && !(await askToSignIn(found, past))) return false;
    const opened = current();
    if (opened !== null) {
      if (past === null && covers(found, opened.name)) {
        await opened.renew(token);
        return true;
      }
      if (!(await leaveFirst())) return false;
      leaveTenant();
    }
    await signIn(token, found);
    return true;
  } catch (error) {
    notice.value = error instanceof Error ? error.message : String(error);
    if (session.value) complain(new Error(notice.value), "The link's token");
    session.value ??= null;
    return false;
  } finally {
    arriving.value = false;
  }
}

/** Does what an address asks for that the page was led to while it is open. */
async function follow(to: Address): Promise<void> {
  if (to.token !== null && !(await arrive(to.token, true))) {
    const opened = current();
    if (opened !== null) writeAddress(opened.name, doc()?.path ?? null);
    return;
  }
  const opened = current();
  if (opened === null) {
    if (session.value) await openFirst(to.tenant, to.file);
  } else if (to.tenant === opened.name) {
    if (to.file !== null) await opened.documents.show(to.file);
  } else if (to.token !== null && to.tenant !== null) {
    switchTenant(to.tenant);
  }
}

// by the event: what is open may have written its own address over that by now
addEventListener("hashchange", ({ newURL }) => void follow(readAddress(newURL)));

render(<App wanted={wanted} />, document.getElementById("app")!);
loaded();
// the file's editor and colours come while the session, the connection and the text are asked for
if (wanted.file !== null) void prepare(wanted.file);

await begin(wanted);
