/** The top bar: tenant, connection, user. */

import { signal } from "@preact/signals";
import { keysOf, palette, run } from "../state/commands.js";
import { nextTheme, phone, previewOpen, theme } from "../state/layout.js";
import { session, signOut } from "../state/session.js";
import { complain } from "../state/toasts.js";
import { leaveTenant, listTenants, openTenant, workspace } from "../state/workspace.js";
import { Connection } from "./connection.js";
import { Dialog, Icon, IconButton, Key } from "./parts.js";
import { Logo } from "./sign-in.js";

const leaving = signal<{ go(): void; stay(): void } | null>(null);

/** Returns whether what is open may be closed: the person is asked where text is unsaved. */
export function leaveFirst(): Promise<boolean> {
  if (!workspace.value?.documents.dirty) return Promise.resolve(true);
  leaving.value?.stay();
  return new Promise((resolve) => {
    leaving.value = { go: () => resolve(true), stay: () => resolve(false) };
  });
}

/** Opens another tenant; asks first where text is unsaved. */
export function switchTenant(name: string): void {
  if (workspace.value?.name === name) return;
  void leaveFirst().then((may) => may && openTenant(name));
}

export async function leave(): Promise<void> {
  if (!(await leaveFirst())) return;
  try {
    await signOut();
    leaveTenant();
  } catch (error) {
    complain(error);
  }
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
      {phone.value && current?.documents.tabs.current.value?.dirty.value && (
        <IconButton icon="save" label="Save" onClick={() => run("file.save")} text />
      )}
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
      <IconButton
        icon="log-out"
        label={`Sign out ${session.value?.subject ?? ""}`}
        onClick={() => void leave()}
      />
      {leaving.value !== null && <Leaving {...leaving.value} />}
    </header>
  );
}

function Leaving({ go, stay }: { go: () => void; stay: () => void }) {
  const end = () => {
    leaving.value = null;
  };
  const remain = () => {
    end();
    stay();
  };
  return (
    <Dialog label="Unsaved changes" class="small" onClose={remain}>
      <h2>Leave with unsaved changes?</h2>
      <p>Some open files have changes that exist only in this window.</p>
      <footer>
        <button type="button" onClick={remain}>
          Cancel
        </button>
        <button
          type="button"
          class="danger"
          onClick={() => {
            end();
            go();
          }}
        >
          Discard
        </button>
        <button
          type="button"
          class="primary"
          onClick={async () => {
            end();
            const { documents } = workspace.value ?? {};
            await documents?.saveAll();
            if (documents?.dirty) stay();
            else go();
          }}
        >
          Save all
        </button>
      </footer>
    </Dialog>
  );
}
