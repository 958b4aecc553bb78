/** Shows the work of agents and colleagues as it happens. */

import { useEffect, useState } from "preact/hooks";
import type { Item } from "../state/activity.js";
import { area, panelOpen } from "../state/layout.js";
import { basename, parent } from "../state/paths.js";
import { session } from "../state/session.js";
import type { Workspace } from "../state/workspace.js";
import { clock, duration, Empty, Icon, IconButton, Spinner } from "./parts.js";
import { Rows } from "./virtual.js";

export function ActivityView({ current }: { current: Workspace }) {
  const { activity } = current;
  const items = activity.items.value;
  const running = activity.running.value;
  return (
    <section class="side-view activity" aria-label="Activity">
      <header>
        <h2>Activity</h2>
        {running > 0 && <span class="badge live">{running} running</span>}
        <span class="grow" />
        <IconButton
          icon="locate"
          label={
            activity.follow.value ? "Stop following written files" : "Follow: open each file that is written"
          }
          pressed={activity.follow.value}
          onClick={() => {
            activity.follow.value = !activity.follow.value;
          }}
        />
        <IconButton icon="trash" label="Clear the list" onClick={() => activity.clear()} />
      </header>
      {items.length === 0 ? (
        <Empty icon="activity" title="Nothing has happened yet">
          Tool calls of agents, commands and saved files appear here as they happen.
        </Empty>
      ) : (
        <Rows
          items={items}
          height={46}
          class="events"
          attributes={{ role: "log", "aria-label": "What happens in this tenant" }}
          row={(item) => <ActivityRow key={item.key} item={item} current={current} />}
        />
      )}
    </section>
  );
}

function ActivityRow({ item, current }: { item: Item; current: Workspace }) {
  const mine = item.by === session.value?.subject;
  const openable = item.path !== null && item.path !== "." && item.state !== "failed";
  // of one that has ended too: its output is kept for ten minutes more
  const watchable = item.exec !== null;
  const show = () => {
    if (openable && item.path !== null) {
      void current.documents.show(item.path);
      area.value = "editor";
    } else if (watchable && item.exec !== null) {
      current.terminals.watch(item.exec, item.what.slice(0, 24));
      panelOpen.value = true;
      area.value = "panel";
    }
  };
  return (
    <button
      type="button"
      class={item.state === "told" ? "event" : `event ${item.state}`}
      disabled={!openable && !watchable}
      title={watchable ? "Show its output" : openable ? "Open the file" : item.what}
      onClick={show}
    >
      <span class="event-icon">
        <Icon name={item.icon} size={14} />
      </span>
      <span class="event-text">
        <span class="event-what">
          <b>{item.verb}</b>{" "}
          {item.path === null ? (
            <code>{item.what}</code>
          ) : (
            <>
              {basename(item.path)}{" "}
              <span class="where">{parent(item.path) === "." ? "" : parent(item.path)}</span>
            </>
          )}
        </span>
        <span class="event-facts">
          <time dateTime={new Date(item.at).toISOString()}>{clock(item.at)}</time>
          {item.by !== "" && <span class={mine && !item.tool ? "who me" : "who"}>{named(item, mine)}</span>}
          {item.times > 1 && <span class="times">{item.times} times</span>}
          {item.code !== null && <span class="code">{item.code.replaceAll("_", " ")}</span>}
          {watchable && <span class="watch">{item.state === "running" ? "show output" : "output"}</span>}
        </span>
      </span>
      <span class="event-end">
        {item.state === "running" ? (
          <>
            <Since at={item.at} />
            <Spinner label="Running" />
          </>
        ) : (
          item.ms !== null && <span class="ms">{duration(item.ms)}</span>
        )}
      </span>
    </button>
  );
}

/** Agents use tools. One that works with the viewer's own token has no other name. */
function named({ by, tool }: Item, mine: boolean): string {
  if (!mine) return by;
  return tool ? `an agent, as ${by}` : "you";
}

function Since({ at }: { at: number }) {
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((count) => count + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  const seconds = Math.floor((Date.now() - at) / 1000);
  return seconds < 1 ? null : (
    <span class="ms">{seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min`}</span>
  );
}
