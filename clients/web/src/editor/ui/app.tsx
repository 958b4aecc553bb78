/** The page's layout, on desktops and phones. */

import { agentUrl } from "../state/agent.js";
import { keysOf, palette } from "../state/commands.js";
import {
  type Area,
  area,
  panelOpen,
  phone,
  previewOpen,
  previewWidth,
  type SideView,
  showSide,
  sideOpen,
  sideView,
  sideWidth,
  toggleSide,
} from "../state/layout.js";
import { session } from "../state/session.js";
import { dismiss, toasts } from "../state/toasts.js";
import { openFirst, tenants, type Workspace, workspace } from "../state/workspace.js";
import { ActivityView } from "./activity.js";
import { AgentView } from "./agent.js";
import { Arrival, arriving } from "./arrival.js";
import { Conflict } from "./conflict.js";
import { Missing } from "./connection.js";
import { DeployView } from "./deploy.js";
import { EditorPane } from "./editor-pane.js";
import { Explorer } from "./explorer.js";
import { HistoryView } from "./history.js";
import type { IconName } from "./icons.js";
import { InsightsView } from "./insights.js";
import { Menu } from "./menu.js";
import { Palette } from "./palette.js";
import { Panel } from "./panel.js";
import { Divider, Empty, Icon } from "./parts.js";
import { Preview } from "./preview.js";
import { SearchView } from "./search.js";
import { Servers } from "./servers.js";
import { SessionEnd } from "./session.js";
import { Settings, settingsOpen } from "./settings.js";
import { SignIn } from "./sign-in.js";
import { TopBar } from "./top-bar.js";
import { looking, TurnDiff, UndoConflict } from "./turn.js";
import { caret } from "./view.js";

export function App({ wanted }: { wanted: { tenant: string | null; file: string | null } }) {
  const current = workspace.value;
  if (session.value === undefined || (arriving.value && current === null)) return <Arrival />;
  // a session that ends leaves the window as it is, with all unsaved text in it
  if (session.value === null && current === null)
    return <SignIn onDone={() => void openFirst(wanted.tenant, wanted.file)} />;
  return (
    <div class={`shell ${phone.value ? "phone" : ""}`} data-area={area.value}>
      <TopBar />
      <div class="lines">
        <Missing />
        {current !== null && <SessionEnd current={current} key={current.name} />}
      </div>
      {phone.value ? <Bottom current={current} /> : <Rail current={current} />}
      {current === null ? (
        <main class="main">
          <Empty icon="server" title={tenants.value.length === 0 ? "No tenant yet" : "Choose a tenant"}>
            <p>
              <code>incus-gateway deploy DOMAIN --template vite-react</code> makes one with a site.
            </p>
          </Empty>
        </main>
      ) : (
        <Main current={current} key={current.name} />
      )}
      {!phone.value && <StatusBar current={current} />}
      {palette.value !== null && (
        <Palette current={current} key={palette.value.mode + palette.value.initial} />
      )}
      {current?.documents.comparing.value != null && (
        <Conflict current={current} doc={current.documents.comparing.value} />
      )}
      {current !== null && looking.value !== null && <TurnDiff turn={looking.value} current={current} />}
      {current?.history.conflict.value != null && (
        <UndoConflict conflict={current.history.conflict.value} current={current} />
      )}
      <Arrival />
      <Menu />
      {settingsOpen.value && <Settings />}
      <div class="toasts" aria-live="polite">
        {toasts.value.map(({ id, kind, text, action }) => (
          <div key={id} class="toast-row">
            <button type="button" class={`toast ${kind}`} onClick={() => dismiss(id)}>
              <Icon name={kind === "error" ? "circle-alert" : "info"} size={15} />
              <span>{text}</span>
            </button>
            {action && (
              <button
                type="button"
                onClick={() => {
                  dismiss(id);
                  action.run();
                }}
              >
                {action.label}
              </button>
            )}
          </div>
        ))}
      </div>
    </div>
  );
}

function Main({ current }: { current: Workspace }) {
  const small = phone.value;
  const side = small ? area.value === "side" : sideOpen.value;
  const preview = small ? area.value === "preview" : previewOpen.value;
  const panel = small ? area.value === "panel" : panelOpen.value;
  return (
    <main class="main">
      {side && (
        <>
          <aside class="side" style={small ? undefined : { width: `${sideWidth.value}px` }}>
            <Side current={current} />
          </aside>
          <Divider
            label="Width of the side"
            vertical
            value={sideWidth.value}
            min={190}
            max={() => window.innerWidth * 0.4}
            onChange={(value) => {
              sideWidth.value = value;
            }}
          />
        </>
      )}
      <div class="centre-column">
        <EditorPane current={current} />
        {panel && <Panel current={current} />}
      </div>
      {preview && (
        <>
          <Divider
            label="Width of the preview"
            vertical
            invert
            value={previewWidth.value}
            min={240}
            max={() => window.innerWidth * 0.6}
            onChange={(value) => {
              previewWidth.value = value;
            }}
          />
          <div class="preview-column" style={small ? undefined : { width: `${previewWidth.value}px` }}>
            <Preview current={current} />
          </div>
        </>
      )}
    </main>
  );
}

function Side({ current }: { current: Workspace }) {
  switch (sideView.value) {
    case "files":
      return <Explorer current={current} />;
    case "search":
      return <SearchView current={current} />;
    case "activity":
      return <ActivityView current={current} />;
    case "history":
      return <HistoryView current={current} />;
    case "deploy":
      return <DeployView current={current} />;
    case "insights":
      return <InsightsView current={current} />;
    case "agent":
      return agentUrl === null ? <Explorer current={current} /> : <AgentView current={current} />;
  }
}

const AGENT = agentUrl === null ? [] : [{ view: "agent", icon: "bot", label: "Agent" } as const];

const VIEWS: readonly { view: SideView; icon: IconName; label: string }[] = [
  ...AGENT,
  { view: "files", icon: "files", label: "Files" },
  { view: "search", icon: "search", label: "Search" },
  { view: "activity", icon: "activity", label: "Activity" },
  { view: "history", icon: "undo", label: "History" },
  { view: "deploy", icon: "rocket", label: "Deploy" },
  { view: "insights", icon: "gauge", label: "Metrics and logs" },
];

function Rail({ current }: { current: Workspace | null }) {
  const running = current?.activity.running.value ?? 0;
  return (
    <nav class="rail" aria-label="Views">
      {VIEWS.map(({ view, icon, label }) => {
        const keys = keysOf(`view.${view}`);
        const shown = sideOpen.value && sideView.value === view;
        return (
          <button
            type="button"
            key={view}
            class={shown ? "active" : ""}
            aria-label={label}
            aria-pressed={shown}
            title={keys === undefined ? label : `${label} (${keys})`}
            onClick={() => toggleSide(view)}
          >
            <Icon name={icon} size={19} />
            {view === "activity" && running > 0 && <span class="pulse" />}
          </button>
        );
      })}
      <span class="grow" />
      <button
        type="button"
        class={panelOpen.value ? "active" : ""}
        aria-label="Terminals"
        aria-pressed={panelOpen.value}
        title={`Terminals (${keysOf("terminal.toggle") ?? ""})`}
        onClick={() => {
          panelOpen.value = !panelOpen.value;
        }}
      >
        <Icon name="square-terminal" size={19} />
      </button>
      <button
        type="button"
        aria-label="Settings"
        title={`Settings (${keysOf("settings") ?? ""})`}
        onClick={() => {
          settingsOpen.value = true;
        }}
      >
        <Icon name="settings-2" size={19} />
      </button>
    </nav>
  );
}

const PLACES: readonly { icon: IconName; label: string; area: Area; view?: SideView }[] = [
  ...AGENT.map((place) => ({ ...place, area: "side" as const })),
  { icon: "activity", label: "Activity", area: "side", view: "activity" },
  { icon: "files", label: "Files", area: "side", view: "files" },
  { icon: "file-code", label: "Editor", area: "editor" },
  { icon: "square-terminal", label: "Terminal", area: "panel" },
  { icon: "globe", label: "Preview", area: "preview" },
  { icon: "gauge", label: "Metrics", area: "side", view: "insights" },
];

function Bottom({ current }: { current: Workspace | null }) {
  const running = current?.activity.running.value ?? 0;
  return (
    <nav class="bottom" aria-label="Views">
      {PLACES.map((place) => {
        const shown =
          area.value === place.area && (place.view === undefined || sideView.value === place.view);
        return (
          <button
            type="button"
            key={place.label}
            class={shown ? "active" : ""}
            aria-pressed={shown}
            onClick={() => {
              if (place.view !== undefined) showSide(place.view);
              else area.value = place.area;
            }}
          >
            <Icon name={place.icon} size={19} />
            <span>{place.label}</span>
            {place.view === "activity" && running > 0 && <span class="pulse" />}
          </button>
        );
      })}
    </nav>
  );
}

function StatusBar({ current }: { current: Workspace | null }) {
  const doc = current?.documents.tabs.current.value ?? null;
  const at = caret.value;
  const server = current?.server.value;
  const waiting = current?.documents.queued ?? 0;
  const unsaved = current?.documents.tabs.open.value.filter(({ dirty }) => dirty.value).length ?? 0;
  return (
    <footer class="status-bar">
      {server && (
        <span class="path" title="The workspace in the container">
          {server.user}@{current?.name}:{server.workspace}
          {doc !== null && `/${doc.path}`}
        </span>
      )}
      <span class="grow" />
      {current !== null && <Servers current={current} />}
      {waiting > 0 && <span class="unsaved">{waiting} waiting to be saved</span>}
      {unsaved > 0 && <span class="unsaved">{unsaved} unsaved</span>}
      {doc !== null && at !== null && (
        <>
          <span>
            Ln {at.line}, Col {at.column}
            {at.selected > 0 && ` (${at.selected} selected)`}
          </span>
          <span>{at.indent}</span>
          <span>{at.lineEnd}</span>
        </>
      )}
      {server && (
        <span title="The gateway's version">
          {server.server.name} {server.server.version}
        </span>
      )}
    </footer>
  );
}
