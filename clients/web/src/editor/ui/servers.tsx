/** The language servers in the status bar: state, memory, and restart. */

import type { ServerState, ServerView } from "../servers/served.js";
import type { Workspace } from "../state/workspace.js";
import { showMenu } from "./menu.js";
import { bytes, Icon } from "./parts.js";

const WORDS: Readonly<Record<ServerState, string>> = {
  installing: "installing…",
  starting: "starting…",
  running: "",
  resting: "resting",
  again: "starting again…",
  failed: "failed",
};

const TITLES: Readonly<Record<ServerState, string>> = {
  installing: "The language server is being installed in the tenant",
  starting: "The language server is reading the site",
  running: "The language server is running in the tenant, within its memory",
  resting: "The language server has ended after a while without use; the next key starts it again",
  again: "The language server has ended and is being restarted",
  failed: "The language server is not running",
};

export function Servers({ current }: { current: Workspace }) {
  return (
    <>
      {current.servers.list.value.map((server) => (
        <Server server={server} key={server.kind} />
      ))}
    </>
  );
}

function Server({ server }: { server: ServerView }) {
  const state = server.state.value;
  const memory = server.memory.value;
  const title = [TITLES[state], server.failure.value].filter(Boolean).join(". ");
  return (
    <button
      type="button"
      class={`server ${state}`}
      title={title}
      onClick={(event) =>
        showMenu(event, server.title, [
          { label: `Start ${server.title} again`, icon: "rotate-cw", run: () => server.restart() },
        ])
      }
    >
      {state === "failed" && <Icon name="circle-alert" size={12} />}
      {[server.title, WORDS[state], memory !== null && bytes(memory)].filter(Boolean).join(" ")}
    </button>
  );
}
