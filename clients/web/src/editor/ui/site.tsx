/** The open tenant's site: what is live, what was, its environment, snapshots, and what ends it. */

import type { DeploymentRecord } from "@incus-gateway/client";
import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";
import { allows } from "../state/session.js";
import { say } from "../state/toasts.js";
import { leaveTenant, listTenants, openFirst, type Workspace } from "../state/workspace.js";
import { Asking, asking, Typed } from "./forms.js";
import { bytes, duration, Icon, IconButton, Spinner } from "./parts.js";
import { leaveFirst } from "./top-bar.js";

export function SiteView({ current }: { current: Workspace }) {
  const { site } = current;
  const ended = current.deploys.list.value.filter(({ state }) => state !== "running").length;
  useEffect(() => {
    void site.look();
  }, [site, ended]);
  const info = current.info.value;
  if (!allows("deploy")) return null;
  return (
    <section class="site-view" aria-label="This site">
      <h3>
        {current.name}
        {site.doing.value !== null && (
          <span class="doing" role="status">
            <Spinner label={site.doing.value} /> {site.doing.value}…
          </span>
        )}
      </h3>
      {site.failure.value !== null && (
        <p class="problem" role="alert">
          {site.failure.value}
        </p>
      )}
      <Part title="Deployments" count={site.deployed.value?.deployments.length ?? 0} open>
        <Deployments current={current} />
      </Part>
      <Part title="Domain" says={info?.domain ?? "none"}>
        <Typed
          label="Domain"
          initial={info?.domain ?? ""}
          verb="Change"
          hint="Visitors use it from then on, and no longer the old one. Leave it empty for none."
          empty
          run={(typed) => site.rename(typed === "" ? null : typed)}
        />
        <Typed
          label="Publish to"
          placeholder="www.example.com"
          verb="Publish"
          hint="Builds this site for production and serves the result at another domain. Publish again to update it."
          run={(typed) => site.publish(typed)}
        />
      </Part>
      <Part title="Environment" count={Object.keys(site.variables.value).length}>
        <Environment current={current} />
      </Part>
      <Part title="Snapshots" count={site.snapshots.value.length}>
        <Snapshots current={current} />
      </Part>
      <Part title={allows("manage") ? "Clone or destroy" : "Clone"}>
        <Typed
          label="Clone to a new tenant"
          placeholder={`${current.name}-2`}
          verb="Clone"
          hint="A copy of the disk, with a new address and no domain yet."
          run={async (typed) => {
            const done = await site.clone(typed, null);
            if (done) say(`${typed} was created.`);
            return done;
          }}
        />
        {allows("manage") && (
          <button type="button" class="danger" onClick={() => destroying(current)}>
            Destroy {current.name}…
          </button>
        )}
      </Part>
      {asking.value !== null && <Asking question={asking.value} key={asking.value.title} />}
    </section>
  );
}

function destroying(current: Workspace): void {
  asking.value = {
    title: `Destroy ${current.name}?`,
    text: "Its site, files, snapshots, former sites and environment are deleted at once and cannot be restored.",
    verb: "Destroy",
    word: current.name,
    run: async () => {
      if (!(await leaveFirst()) || !(await current.site.destroy())) return;
      leaveTenant();
      await listTenants();
      await openFirst(null, null);
    },
  };
}

function Part(props: {
  title: string;
  count?: number;
  says?: string;
  open?: boolean;
  children: ComponentChildren;
}) {
  return (
    <details open={props.open}>
      <summary>
        <Icon name="chevron-right" size={13} />
        <span>{props.title}</span>
        <span class="where">{props.says ?? (props.count || "")}</span>
      </summary>
      <div class="part">{props.children}</div>
    </details>
  );
}

const STATES: Readonly<Record<string, string>> = {
  waiting: "Waiting",
  running: "Deploying",
  succeeded: "Done",
  undoing: "Undoing",
  rolledback: "Failed",
};

function kindOf({ rollback, env, template, kind }: DeploymentRecord): string {
  if (rollback) return "Rollback";
  if (env) return `Environment: ${env.join(", ")}`;
  return kind === "create" ? `From ${template}` : `Update from ${template}`;
}

function when(seconds: number): string {
  return new Date(seconds * 1000).toLocaleString(undefined, {
    month: "short",
    day: "numeric",
    hour: "2-digit",
    minute: "2-digit",
  });
}

function Deployments({ current }: { current: Workspace }) {
  const { site } = current;
  const deployed = site.deployed.value;
  const domain = current.info.value?.domain ?? "";
  const busy =
    site.doing.value !== null || current.deploys.list.value.some(({ state }) => state === "running");
  if (deployed === null) return <Spinner label="Asking" />;
  if (deployed.deployments.length === 0) return <p class="hint">Nothing has been deployed yet.</p>;
  return (
    <ul class="records">
      {deployed.deployments.slice(0, SHOWN).map((record) => {
        const live = record.id === deployed.live;
        const kept = deployed.kept.some(({ id }) => id === record.id);
        return (
          <li key={record.id}>
            <span class={`badge ${live ? "succeeded" : record.state === "rolledback" ? "failed" : ""}`}>
              {live ? "Live" : (STATES[record.state] ?? record.state)}
            </span>
            <span class="record">
              <b>{kindOf(record)}</b>
              <span class="where">
                {when(record.created)}
                {record.ms !== null && ` · ${duration(record.ms)}`}
              </span>
              {record.error !== null && <span class="problem">{record.error.message}</span>}
            </span>
            {kept && (
              <button
                type="button"
                disabled={busy}
                title="Serve this site again, with its files and environment"
                onClick={() => {
                  asking.value = {
                    title: `Go back to the site of ${when(record.created)}?`,
                    text: "The site that is live now is kept with all its changes, so that you can go forward again.",
                    verb: "Go back",
                    run: () => void site.rollback(domain, record.id),
                  };
                }}
              >
                Go back
              </button>
            )}
          </li>
        );
      })}
    </ul>
  );
}

/** How many deployments are listed. */
const SHOWN = 12;

function Environment({ current }: { current: Workspace }) {
  const { site } = current;
  const [name, setName] = useState("");
  const [value, setValue] = useState("");
  const variables = Object.entries(site.variables.value);
  const domain = current.info.value?.domain ?? "";
  const shown = variables.some(([, known]) => known !== null);
  return (
    <>
      {variables.length > 0 && (
        <ul class="records">
          {variables.map(([known, content]) => (
            <li key={known}>
              <code class="record">
                {known}
                {content !== null && <span class="value">{content}</span>}
              </code>
              <IconButton
                icon="trash"
                size={13}
                label={`Remove ${known}`}
                onClick={() => {
                  asking.value = {
                    title: `Remove ${known}?`,
                    text: "The site restarts without it. Its value is kept only with the former site.",
                    verb: "Remove",
                    run: () => void site.setVariable(domain, known, null),
                  };
                }}
              />
            </li>
          ))}
        </ul>
      )}
      {variables.length > 0 && allows("exec") && (
        <button type="button" onClick={() => (shown ? site.hideValues() : void site.showValues())}>
          {shown ? "Hide values" : "Show values"}
        </button>
      )}
      <form
        class="variable"
        onSubmit={async (event) => {
          event.preventDefault();
          if (!(await site.setVariable(domain, name.trim(), value))) return;
          setName("");
          setValue("");
        }}
      >
        <div class="field small">
          <input
            aria-label="Name of the variable"
            placeholder="NAME"
            spellcheck={false}
            value={name}
            onInput={(event) => setName(event.currentTarget.value)}
          />
        </div>
        <div class="field small">
          <input
            aria-label="Value of the variable"
            placeholder="value"
            type="password"
            autocomplete="off"
            value={value}
            onInput={(event) => setValue(event.currentTarget.value)}
          />
        </div>
        <button type="submit" disabled={name.trim() === "" || site.doing.value !== null}>
          Set
        </button>
      </form>
      <p class="hint">Each change restarts the site; visitors notice nothing.</p>
    </>
  );
}

function Snapshots({ current }: { current: Workspace }) {
  const { site } = current;
  return (
    <>
      <ul class="records">
        {[...site.snapshots.value].reverse().map(({ name, created, size }) => (
          <li key={name}>
            <span class="record">
              <b>{name}</b>
              <span class="where">
                {created !== null && when(Date.parse(created) / 1000)}
                {size !== null && ` · ${bytes(size)}`}
              </span>
            </span>
            <button
              type="button"
              onClick={() => {
                asking.value = {
                  title: `Restore ${name}?`,
                  text: "The whole disk is restored: files, history and installed programs. All later changes are lost, and everything that runs in the tenant ends. Take a snapshot first if you may want them back.",
                  verb: "Restore",
                  run: () => void site.restore(name),
                };
              }}
            >
              Restore
            </button>
            {allows("manage") && (
              <IconButton
                icon="trash"
                size={13}
                label={`Delete ${name}`}
                onClick={() => {
                  asking.value = {
                    title: `Delete ${name}?`,
                    text: "The tenant stays as it is, but cannot be restored to this snapshot any more.",
                    verb: "Delete",
                    run: () => void site.deleteSnapshot(name),
                  };
                }}
              />
            )}
          </li>
        ))}
      </ul>
      <Typed
        label="New snapshot"
        placeholder="by the time"
        verb="Take"
        hint="Saves the current state of the disk. At most 20."
        empty
        run={(typed) => site.snapshot(typed)}
      />
    </>
  );
}
