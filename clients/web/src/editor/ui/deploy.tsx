/** The deploy panel: start a deployment and watch it to its end. */

import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import type { Deploy, Phase } from "../state/deploys.js";
import { allows } from "../state/session.js";
import { complain } from "../state/toasts.js";
import type { Workspace } from "../state/workspace.js";
import { Coloured, clock, duration, Icon, Spinner } from "./parts.js";
import { SiteView } from "./site.js";
import { switchTenant } from "./top-bar.js";

const MEANING: Readonly<Record<string, string>> = {
  validate: "Domain, quota",
  create: "A container",
  push: "The files",
  install: "Dependencies",
  start: "The site's service",
  expose: "An address",
  route: "Through Caddy",
  verify: "The site answers",
};

const domain = signal("");
const template = signal("vite-react");

export function DeployView({ current }: { current: Workspace }) {
  const { deploys } = current;
  const [newest, ...older] = deploys.list.value;
  const may = allows("deploy");
  const busy = deploys.starting.value;
  useEffect(() => {
    if (may) void deploys.look();
  }, [deploys, may]);
  const known = deploys.templates.value;
  useEffect(() => {
    if (known[0] !== undefined && !known.some(({ name }) => name === template.value))
      template.value = known[0].name;
  }, [known]);
  const submit = (event: Event) => {
    event.preventDefault();
    void deploys.start({ domain: domain.value.trim(), template: template.value.trim() });
  };
  return (
    <section class="side-view deploy" aria-label="Deploy">
      <header>
        <h2>Deploy</h2>
      </header>
      <div class="scroll">
        <SiteView current={current} key={current.name} />
        {newest !== undefined && <Card deploy={newest} current={current} />}
        <h3 class="deploy-new">A new site</h3>
        <form class="deploy-form" onSubmit={submit}>
          <label for="deploy-domain">Domain</label>
          <div class="field">
            <Icon name="globe" size={14} />
            <input
              id="deploy-domain"
              placeholder="shop.example.com"
              spellcheck={false}
              autocapitalize="off"
              value={domain.value}
              onInput={(event) => {
                domain.value = event.currentTarget.value;
              }}
            />
          </div>
          <fieldset class="templates">
            <legend>Template</legend>
            {deploys.templates.value.map(({ name, description }) => (
              <label key={name} class={template.value === name ? "template chosen" : "template"}>
                <input
                  type="radio"
                  name="template"
                  value={name}
                  checked={template.value === name}
                  onChange={() => {
                    template.value = name;
                  }}
                />
                <span class={`sketch ${sketch(name)}`} aria-hidden="true">
                  <i />
                  <i />
                  <i />
                </span>
                <span class="template-text">
                  <b>{name}</b>
                  <span class="where">{description}</span>
                </span>
              </label>
            ))}
            {deploys.templates.value.length === 0 && <p class="hint">This gateway has no templates.</p>}
          </fieldset>
          <button
            type="submit"
            class="primary"
            disabled={!may || busy || !domain.value.trim() || !template.value.trim()}
          >
            {busy ? <Spinner label="Starting" /> : "Deploy"}
          </button>
          {!may && <p class="hint">This token lacks the scope deploy.</p>}
          {deploys.failure.value !== null && (
            <p class="problem" role="alert">
              {deploys.failure.value}
            </p>
          )}
        </form>
        {older.length > 0 && (
          <div class="older">
            <h3>Before</h3>
            {older.map((deploy) => (
              <div class="older-row" key={deploy.id}>
                <Verdict deploy={deploy} />
                <span class="name">{deploy.domain || deploy.tenant}</span>
                <time>{clock(deploy.at)}</time>
              </div>
            ))}
          </div>
        )}
      </div>
    </section>
  );
}

/** How a template's picture is drawn: of what it is, not of how it is called. */
function sketch(name: string): string {
  return /static|html/.test(name) ? "page" : /api|server|hono|express/.test(name) ? "server" : "app";
}

function Card({ deploy, current }: { deploy: Deploy; current: Workspace }) {
  const log = useRef<HTMLPreElement>(null);
  useEffect(() => {
    const element = log.current;
    if (element !== null && element.scrollHeight - element.scrollTop - element.clientHeight < 120) {
      element.scrollTop = element.scrollHeight;
    }
  }, [deploy.log.length]);
  return (
    <article class={`deployment ${deploy.state}`} aria-label={`Deployment of ${deploy.domain}`}>
      <header>
        <Verdict deploy={deploy} />
        <strong>{deploy.domain || deploy.tenant}</strong>
        <span class="grow" />
        {deploy.ms !== null && <span class="ms">{duration(deploy.ms)}</span>}
        {deploy.state === "running" && (
          <button
            type="button"
            onClick={() => current.deploys.cancel(deploy.id).catch((error) => complain(error))}
          >
            Cancel
          </button>
        )}
      </header>
      <ol class="phases">
        {deploy.phases.map((phase) => (
          <PhaseRow key={phase.name} phase={phase} />
        ))}
      </ol>
      {deploy.error !== null && (
        <p class="problem" role="alert">
          {deploy.error}
          {deploy.undone && " Everything it did was undone."}
        </p>
      )}
      {deploy.log.length > 0 && (
        // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keys
        <pre class="log" ref={log} role="log" tabIndex={0} aria-label="Log of the deployment">
          <Coloured text={deploy.log.join("\n")} />
        </pre>
      )}
      {deploy.state === "succeeded" && deploy.tenant !== current.name && (
        <button type="button" class="primary" onClick={() => switchTenant(deploy.tenant)}>
          Open {deploy.tenant}
        </button>
      )}
    </article>
  );
}

function PhaseRow({ phase }: { phase: Phase }) {
  return (
    <li class={`phase ${phase.state}`} data-phase={phase.name}>
      <span class="phase-mark">
        {phase.state === "running" ? (
          <Spinner label="Running" />
        ) : phase.state === "done" ? (
          <Icon name="check" size={13} />
        ) : phase.state === "failed" ? (
          <Icon name="x" size={13} />
        ) : phase.state === "undone" ? (
          <Icon name="undo" size={13} />
        ) : (
          <span class="pending" />
        )}
      </span>
      <span class="phase-name">{phase.name}</span>
      <span class="phase-what">{MEANING[phase.name] ?? ""}</span>
      <span class="ms">{phase.ms === null ? "" : duration(phase.ms)}</span>
    </li>
  );
}

function Verdict({ deploy }: { deploy: Deploy }) {
  const words = { running: "Deploying", succeeded: "Live", failed: "Failed", cancelled: "Cancelled" };
  return <span class={`badge ${deploy.state}`}>{words[deploy.state]}</span>;
}
