/** The dialog in which a person says what he likes. */

import { type Signal, signal } from "@preact/signals";
import { type Theme, theme } from "../state/layout.js";
import {
  autosave,
  CODE_SIZES,
  codeSize,
  formatOnSave,
  KEYS,
  keys,
  languageServers,
  TAB_WIDTHS,
  tabWidth,
  wrap,
} from "../state/settings.js";
import { Dialog } from "./parts.js";

export const settingsOpen = signal(false);

export function Settings() {
  const close = () => {
    settingsOpen.value = false;
  };
  return (
    <Dialog label="Settings" class="small settings" onClose={close}>
      <h2>Settings</h2>
      <p>They apply to this browser.</p>
      <Choice
        label="Colours"
        of={theme}
        values={["system", "light", "dark"] satisfies Theme[]}
        named={(value) => (value === "system" ? "as the system" : value)}
      />
      <Choice label="Font size" of={codeSize} values={CODE_SIZES} named={(value) => `${value} px`} />
      <Choice
        label="Width of a tab"
        of={tabWidth}
        values={TAB_WIDTHS}
        named={(value) => `${value} columns`}
      />
      <Choice
        label="Keys"
        of={keys}
        values={KEYS}
        named={(value) => ({ default: "Standard", vim: "Vim" })[value]}
      />
      <Switch label="Wrap long lines" of={wrap} />
      <Switch label="Save automatically, a second after the last key" of={autosave} />
      <Switch label="Format a file before it is saved" of={formatOnSave} />
      <Switch label="Completions and errors from language servers in the tenant" of={languageServers} />
      <footer>
        <button type="button" class="primary" onClick={close}>
          Done
        </button>
      </footer>
    </Dialog>
  );
}

function Choice<Value extends string | number>(props: {
  label: string;
  of: Signal<Value>;
  values: readonly Value[];
  named: (value: Value) => string;
}) {
  return (
    <label class="setting">
      <span>{props.label}</span>
      <select
        value={String(props.of.value)}
        onChange={(event) => {
          const chosen = props.values.find((value) => String(value) === event.currentTarget.value);
          if (chosen !== undefined) props.of.value = chosen;
        }}
      >
        {props.values.map((value) => (
          <option key={value} value={String(value)}>
            {props.named(value)}
          </option>
        ))}
      </select>
    </label>
  );
}

function Switch({ label, of }: { label: string; of: Signal<boolean> }) {
  return (
    <label class="setting">
      <span>{label}</span>
      <input
        type="checkbox"
        checked={of.value}
        onChange={(event) => {
          of.value = event.currentTarget.checked;
        }}
      />
    </label>
  );
}
