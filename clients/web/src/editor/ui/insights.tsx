/** Draws what a tenant uses and what its site logs. */

import type { ExecInfo } from "@incus-gateway/client";
import { signal } from "@preact/signals";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Sample } from "../state/insights.js";
import { allows } from "../state/session.js";
import { complain, say } from "../state/toasts.js";
import type { Workspace } from "../state/workspace.js";
import type { IconName } from "./icons.js";
import { bytes, Coloured, clock, Dialog, Empty, Icon, IconButton, plain } from "./parts.js";

const filter = signal("");
const stopping = signal<"stop" | "restart" | null>(null);

export function InsightsView({ current }: { current: Workspace }) {
  const { insights } = current;
  useEffect(() => {
    const ending = new AbortController();
    void insights.watch(ending.signal);
    void insights.follow(ending.signal);
    return () => ending.abort();
  }, [insights]);
  const samples = insights.samples.value;
  const usage = insights.usage.value;
  const last = samples.at(-1);
  const info = current.info.value;
  const disk = usage?.disk_bytes;
  return (
    <section class="side-view insights" aria-label="Metrics and logs">
      <header>
        <h2>Metrics</h2>
        <span class={`badge ${info?.status ?? ""}`}>{info?.status ?? "…"}</span>
        <span class="grow" />
        {allows("deploy") && <Life current={current} />}
      </header>
      {insights.failure.value !== null && <p class="problem">{insights.failure.value}</p>}
      <div class="charts">
        <Chart
          icon="cpu"
          label="Processor"
          value={last?.cpu == null ? "–" : `${last.cpu.toFixed(last.cpu < 10 ? 1 : 0)} %`}
          series={[samples.map(({ cpu }) => cpu)]}
          least={20}
        />
        <Chart
          icon="memory-stick"
          label="Memory"
          value={last?.memory == null ? "–" : bytes(last.memory)}
          limit={usage?.memory_limit_bytes == null ? undefined : `of ${bytes(usage.memory_limit_bytes)}`}
          series={[samples.map(({ memory }) => memory)]}
          most={usage?.memory_limit_bytes ?? undefined}
          least={1 << 20}
        />
        <Chart
          icon="arrow-up-down"
          label="Network"
          value={last?.received == null ? "–" : `${bytes(last.received + (last.sent ?? 0))}/s`}
          series={[samples.map(({ received }) => received), samples.map(({ sent }) => sent)]}
          least={1024}
        />
        <Chart
          icon="list-tree"
          label="Processes"
          value={last?.processes == null ? "–" : String(last.processes)}
          limit={disk == null ? undefined : `disk ${bytes(disk)}`}
          series={[samples.map(({ processes }) => processes)]}
          least={5}
        />
      </div>
      <Journal current={current} />
    </section>
  );
}

function Life({ current }: { current: Workspace }) {
  const status = current.info.value?.status;
  const act = async (word: "start" | "stop" | "restart") => {
    stopping.value = null;
    try {
      say(`${current.name}: ${word}…`);
      current.info.value = await current.tenant[word]();
    } catch (error) {
      complain(error);
    }
  };
  const ask = (word: "stop" | "restart") => {
    stopping.value = word;
  };
  return status === "running" ? (
    <>
      <IconButton icon="rotate-cw" label="Restart the tenant" onClick={() => ask("restart")} size={14} />
      <IconButton icon="power" label="Stop the tenant" onClick={() => ask("stop")} size={14} />
      {stopping.value !== null && (
        <Stopping current={current} word={stopping.value} act={act} key={stopping.value} />
      )}
    </>
  ) : (
    <IconButton icon="play" label="Start the tenant" onClick={() => void act("start")} size={14} />
  );
}

/** How many of the commands that end are named. */
const NAMED = 5;

/** Asks before everything that runs is ended, and says what that is. */
function Stopping(props: {
  current: Workspace;
  word: "stop" | "restart";
  act: (word: "stop" | "restart") => Promise<void>;
}) {
  const { current, word, act } = props;
  const [running, setRunning] = useState<readonly ExecInfo[] | null>(null);
  useEffect(() => {
    if (!allows("exec")) return;
    let gone = false;
    void current.tenant
      .execs()
      .then((execs) => !gone && setRunning(execs.filter(({ state }) => state === "running")))
      .catch(() => {}); // the question stands without the list
    return () => {
      gone = true;
    };
  }, [current]);
  const close = () => {
    stopping.value = null;
  };
  const verb = word === "stop" ? "Stop" : "Restart";
  const terminals = running?.filter(({ pty }) => Boolean(pty)).length ?? 0;
  const commands = running?.filter(({ pty }) => !pty) ?? [];
  return (
    <Dialog label={`${verb} ${current.name}`} class="small" onClose={close}>
      <h2>
        {verb} {current.name}?
      </h2>
      <p>
        {word === "stop"
          ? "Its site is down until the tenant is started again. Everything that runs in it ends, including other people's terminals and commands. Files stay."
          : "Its site is down for a few seconds. Everything that runs in it ends, including other people's terminals and commands. Files stay."}
      </p>
      {running !== null && running.length > 0 && (
        <ul aria-label="What ends">
          {terminals > 0 && <li>{terminals === 1 ? "1 terminal" : `${terminals} terminals`}</li>}
          {commands.slice(0, NAMED).map(({ exec, argv }) => (
            <li key={exec}>
              <code>{argv.join(" ").slice(0, 80)}</code>
            </li>
          ))}
          {commands.length > NAMED && <li>{commands.length - NAMED} more commands</li>}
        </ul>
      )}
      <footer>
        <button type="button" autofocus onClick={close}>
          Cancel
        </button>
        <button type="button" class="danger" onClick={() => void act(word)}>
          {verb}
        </button>
      </footer>
    </Dialog>
  );
}

const WIDTH = 200;
const HEIGHT = 40;
/** How many periods fill a chart: few at first, so that it does not look empty for minutes. */
const LEAST = 8;
const MOST = 89;

function Chart(props: {
  icon: IconName;
  label: string;
  value: string;
  limit?: string | undefined;
  series: readonly (readonly Sample[keyof Sample][])[];
  least: number;
  most?: number | undefined;
}) {
  const all = props.series.flat().filter((value) => value !== null);
  // a tenant that does not run has a limit of nothing
  const top = props.most || Math.max(props.least, ...all) * 1.15;
  const span = (count: number) => Math.min(MOST, Math.max(LEAST, count - 1));
  const x = (index: number, count: number) => WIDTH - (count - 1 - index) * (WIDTH / span(count));
  const collecting = !props.series.some((values) => values.filter((value) => value !== null).length > 1);
  return (
    <figure class="chart" aria-label={`${props.label}: ${props.value}`}>
      <figcaption>
        <Icon name={props.icon} size={13} />
        <span>{props.label}</span>
        <span class="grow" />
        {props.limit !== undefined && <span class="limit">{props.limit}</span>}
        <b>{props.value}</b>
      </figcaption>
      {collecting ? (
        <p class="collecting">Collecting…</p>
      ) : (
        <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" aria-hidden="true">
          {props.series.map((values, number) => {
            const points = values
              .map((value, index) =>
                value === null
                  ? null
                  : `${x(index, values.length).toFixed(1)},${(HEIGHT - (value / top) * HEIGHT).toFixed(1)}`,
              )
              .filter((point) => point !== null);
            if (points.length < 2) return null;
            const first = points[0]?.split(",")[0];
            return (
              <g key={number} class={`series s${number}`}>
                <polygon points={`${first},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`} />
                <polyline points={points.join(" ")} vector-effect="non-scaling-stroke" />
              </g>
            );
          })}
        </svg>
      )}
    </figure>
  );
}

/** What journald puts before each line: when, and which process wrote it. */
const STAMP = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:[+-]\d\d:?\d\d|Z) (?:\S+: )?/;

/** What Vite puts before its own lines, which is the same once more. */
// biome-ignore lint/suspicious/noControlCharactersInRegex: which may have a colour
const CLOCK = /^((?:\x1b\[[\d;]*m)*)\d{1,2}:\d\d:\d\d [AP]M /;

function LogLine({ line }: { line: string }) {
  const stamp = STAMP.exec(line)?.[0];
  const at = stamp === undefined ? Number.NaN : Date.parse(stamp.split(" ", 1)[0] ?? "");
  if (stamp === undefined || Number.isNaN(at))
    return (
      <span>
        <Coloured text={line} />
      </span>
    );
  return (
    <>
      <time dateTime={new Date(at).toISOString()} title={stamp.trim()}>
        {clock(at)}
      </time>
      <span>
        <Coloured text={line.slice(stamp.length).replace(CLOCK, "$1")} />
      </span>
    </>
  );
}

function Journal({ current }: { current: Workspace }) {
  const { insights } = current;
  const element = useRef<HTMLDivElement>(null);
  const stick = useRef(true);
  const wanted = filter.value.toLowerCase();
  const lines = insights.lines.value.filter(
    (line) => wanted === "" || plain(line).toLowerCase().includes(wanted),
  );
  useEffect(() => {
    if (stick.current && element.current) element.current.scrollTop = element.current.scrollHeight;
  }, [lines.length, lines.at(-1)]);
  return (
    <div class="journal">
      <header>
        <h2>Site log</h2>
        {insights.following.value && insights.logFailure.value === null && (
          <span class="badge live">live</span>
        )}
        <span class="grow" />
        <div class="field small">
          <input
            placeholder="Filter"
            aria-label="Filter the log"
            value={filter.value}
            onInput={(event) => {
              filter.value = event.currentTarget.value;
            }}
          />
        </div>
      </header>
      {insights.logFailure.value !== null ? (
        <Empty icon="scroll-text" title="No log">
          {insights.logFailure.value}
        </Empty>
      ) : lines.length === 0 ? (
        <Empty icon="scroll-text" title={wanted === "" ? "The log is empty" : "No line contains this"} />
      ) : (
        <div
          class="log-lines"
          ref={element}
          role="log"
          aria-label="Log of the site"
          // biome-ignore lint/a11y/noNoninteractiveTabindex: a part that scrolls must be reachable by keys
          tabIndex={0}
          onScroll={(event) => {
            const host = event.currentTarget;
            stick.current = host.scrollHeight - host.scrollTop - host.clientHeight < 24;
          }}
        >
          {lines.map((line, index) => (
            <div
              key={index}
              class={
                /\b(error|fail|fatal|exception)/i.test(plain(line))
                  ? "bad"
                  : /\bwarn/i.test(plain(line))
                    ? "warn"
                    : ""
              }
            >
              <LogLine line={line} />
            </div>
          ))}
        </div>
      )}
    </div>
  );
}
