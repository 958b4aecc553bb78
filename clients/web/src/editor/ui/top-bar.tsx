/** Knows the bar at the top: which tenant, how the connection is, who one is. */

import { signal } from "@preact/signals";
import { keysOf, palette } from "../state/commands.js";
import { nextTheme, phone, previewOpen, theme } from "../state/layout.js";
import { session, signOut } from "../state/session.js";
import { complain } from "../state/toasts.js";
import { listTenants, openTenant, workspace } from "../state/workspace.js";
import { Connection } from "./connection.js";
import { Dialog, Icon, IconButton, Key } from "./parts.js";
import { Logo } from "./sign-in.js";

const leaving = signal<(() => void) | null>(null);

/** Opens another tenant; asks first where text is unsaved. */
export function switchTenant(name: string): void {
  if (workspace.value?.documents.dirty && workspace.value.name !== name)
    leaving.value = () => openTenant(name);
  else openTenant(name);
}

export function leave(): void {
  const go = () => void signOut().catch((error) => complain(error));
  if (workspace.value?.documents.dirty) leaving.value = go;
  else go();
}

export function TopBar() {
  const current = workspace.value;
  const info = current?.info.value;
  const names = { system: "as the system", light: "light", dark: "dark" };
  const icons = { system: "monitor", light: "sun", dark: "moon" } as const;
  return (
    <header class="top-bar">
      <Logo />
      <button
        type="button"
        class="tenant-switch"
        aria-haspopup="dialog"
        title="Open another tenant"
        onClick={() => {
          void listTenants();
          palette.value = { mode: "tenants", initial: "" };
        }}
      >
        <span class={`lamp ${info?.status ?? ""}`} title={info?.status} />
        <strong>{current?.name ?? "No tenant"}</strong>
        {info?.domain && <span class="where">{info.domain}</span>}
        <Icon name="chevrons-up-down" size={13} />
      </button>
      <button
        type="button"
        class="finder"
        title="Find a file or command"
        onClick={() => {
          palette.value = { mode: "files", initial: "" };
        }}
      >
        <Icon name="search" size={14} />
        <span>Find a file or command</span>
        {!phone.value && <Key>{keysOf("file.open") ?? ""}</Key>}
      </button>
      <Connection />
      <IconButton
        icon="panel-right"
        label="Preview of the site"
        keys={keysOf("preview.toggle")}
        pressed={previewOpen.value}
        onClick={() => {
          previewOpen.value = !previewOpen.value;
        }}
      />
      <IconButton icon={icons[theme.value]} label={`Colours: ${names[theme.value]}`} onClick={nextTheme} />
      <IconButton icon="log-out" label={`Sign out ${session.value?.subject ?? ""}`} onClick={leave} />
      {leaving.value !== null && <Leaving go={leaving.value} />}
    </header>
  );
}

function Leaving({ go }: { go: () => void }) {
  const end = () => {
    leaving.value = null;
  };
  return (
    <Dialog label="Unsaved changes" class="small" onClose={end}>
      <h2>Leave with unsaved changes?</h2>
      <p>Some open files have changes that are nowhere but in this window.</p>
      <footer>
        <button type="button" onClick={end}>
          Stay
        </button>
        <button
          type="button"
          class="danger"
          onClick={() => {
            end();
            go();
          }}
        >
          Throw away
        </button>
        <button
          type="button"
          class="primary"
          onClick={async () => {
            end();
            const { documents } = workspace.value ?? {};
            await documents?.saveAll();
            if (!documents?.dirty) go();
          }}
        >
          Save all
        </button>
      </footer>
    </Dialog>
  );
}
