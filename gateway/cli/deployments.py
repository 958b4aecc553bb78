"""Deployments on the command line: their progress, the list of former ones, rollback, the environment."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final

import rich.console
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from gateway.cli.invocation import (
    Failed,
    Json,
    TokenOption,
    Url,
    at_terminal,
    client_of,
    tenant_of,
)
from gateway.deployments.record import PHASES
from gateway.terminal import TerminalOutput, clean, err, line, out
from gateway_client.deployments import Deployment, DeploymentRecord


class Console(rich.console.Console):
    """A console that cleans all text before it applies our styles."""

    def __init__(self) -> None:
        super().__init__(soft_wrap=True, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)


_SAYS: Final = {
    "validate": "check domain and template",
    "create": "make the container",
    "push": "copy the files",
    "install": "install dependencies",
    "start": "start the site",
    "expose": "give it an address",
    "route": "route the domain to it",
    "verify": "see it answer",
}
_PRINTED: Final = 500  # lines; an error has fewer
EventHandler = Callable[[Mapping[str, Any]], None]


async def follow(deployment: Deployment, handle: EventHandler) -> DeploymentRecord:
    """Pass each event of a deployment to a function as `{type, **data}`, and return the final record.

    If the task is cancelled, cancel the deployment, and raise once it is undone.
    """
    try:
        async for event in deployment.events():
            handle({"type": event.type, "time": event.time, **event.data})
    except asyncio.CancelledError:
        await asyncio.shield(deployment.cancel())
        raise
    return await deployment.record()


@dataclass
class _Line:
    state: str = "waiting"
    began: float = 0.0
    ms: int | None = None
    note: str = ""


@dataclass
class DeploymentProgress:
    """A deployment as lines that are redrawn while it runs. Use as a context manager around `follow`."""

    console: TerminalOutput
    domain: str
    lines: dict[str, _Line] = field(default_factory=lambda: {name: _Line() for name in PHASES})
    last: str = ""
    undoing: bool = False
    detected: list[str] = field(default_factory=list)
    printed: deque[str] = field(default_factory=lambda: deque(maxlen=_PRINTED))
    """The last lines of output that were printed."""
    _live: Live | None = None

    def __enter__(self) -> DeploymentProgress:
        if self.console.is_terminal:
            self._live = Live(self, console=Console(), refresh_per_second=12)
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self.last = ""
            self._live.__exit__(*error)

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event; without a terminal, print a line if it is worth one."""
        kind, phase = event["type"].removeprefix("deployment."), self.lines.get(event.get("phase", ""))
        match kind:
            case "phase.started" if phase is not None:
                phase.state, phase.began = "running", time.monotonic()
            case "phase.log":
                self.last = line(event["lines"][-1])
                if self._live is None:
                    for said in event["lines"]:
                        self.printed.append(line(said))
                        self.console.say(f"    {self.printed[-1]}")
            case "phase.finished" if phase is not None:
                phase.state, phase.ms = "done", event["ms"]
                phase.note = _note(event)
                self.last = ""
                if (found := event.get("detected")) is not None:
                    self.detected = [line(str(said)) for said in found["lines"]]
                if self._live is None:
                    self.console.say(f"{event['phase']:9} {_seconds(phase.ms):>8}  {phase.note}")
                    if event["phase"] == "validate":
                        for said in self.detected:
                            self.console.say(f"    {said}")
            case "failed" | "cancelled":
                self.undoing = True
                if phase is not None:
                    phase.state = "failed"
            case "succeeded" | "rolledback":
                self.undoing = False

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, phase in self.lines.items():
            passed = phase.ms if phase.ms is not None else int((time.monotonic() - phase.began) * 1000)
            match phase.state:
                case "done":
                    row: tuple[RenderableType, ...] = (
                        Text("✓", "green"), name, Text(_seconds(passed), "dim"), Text(phase.note, "dim")
                    )  # fmt: skip
                case "running":
                    says = Text(self.last or _SAYS[name], "cyan", overflow="ellipsis", no_wrap=True)
                    row = (Spinner("dots", style="cyan"), Text(name, "bold"), _seconds(passed), says)
                case "failed":
                    row = (Text("✗", "red"), Text(name, "red"), "", "")
                case _:
                    row = (" ", Text(name, "dim"), "", "")
            table.add_row(*row)
            if name == "validate":
                for said in self.detected:
                    table.add_row("", "", "", Text(said, overflow="ellipsis", no_wrap=True))
        title = Text(f"Deploying {self.domain}", "bold")
        if self.undoing:
            return Group(title, table, Text("undoing …", "yellow"))
        return Group(title, table)


def _note(event: Mapping[str, Any]) -> str:
    match event["phase"]:
        case "validate":
            return "; ".join(f"warning: {line(str(said))}" for said in event.get("warnings", ()))
        case "create":
            said = {
                "pool": "one was ready",
                "golden": "a copy of an installed one",
                "tenant": "it is there",
            }
            return said.get(event.get("from", ""), "from the base image")
        case "expose":
            return f"{event.get('address')}:{event.get('port')}"
        case "route":
            return str(event.get("url", ""))
    return ""


def _seconds(ms: int) -> str:
    return f"{ms / 1000:.2f} s"


Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="The site's domain, or its tenant")]


async def followed(begun: Deployment, domain: str, *, as_json: bool) -> DeploymentRecord:
    """Show a deployment until it ends; return its record."""
    if as_json:
        return await follow(begun, out.json)
    with DeploymentProgress(out, domain) as progress:
        record = await follow(begun, progress.show)
    if record.error is not None:  # it ends with output that may stand above already
        said = record.error.message.splitlines()
        record.error.message = "\n".join(one for one in said if line(one) not in progress.printed)
    return record


def ended(work: Coroutine[Any, Any, DeploymentRecord]) -> DeploymentRecord:
    """Return the record of a deployment that succeeded. Raises `Failed` for any other."""
    record: DeploymentRecord = asyncio.run(work)
    if record.error is not None:
        where = record.error.facts.get("phase", "deploy")
        raise Failed(f"{where}: {record.error.message}\nEverything it did has been undone.")
    return record


# --- commands -----------------------------------------------------------------------------------------------


class Action(StrEnum):
    LIST = "list"
    SET = "set"
    UNSET = "unset"


def deployments(domain: Domain, as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """List a site's deployments: which one is live, and which can be rolled back to."""

    async def run() -> None:
        async with client_of(url, token) as client:
            history = await (await tenant_of(client, domain)).deployments()
        if as_json:
            out.json(history.all, indent=True)
            return
        known = {record.id for record in history.deployments}
        rows: list[Sequence[str]] = [
            (
                *(record.id, _when(record.all["created"]), _what(record), _state(record)),
                "live" if record.id == history.live else "kept" if record.id in history.kept else "",
            )
            for record in history.deployments
        ]
        # those whose record is gone, or which were made under another name
        rows += [(identity, "", "", "", "kept") for identity in history.kept if identity not in known]
        out.table(("id", "created", "what", "state", ""), rows)

    asyncio.run(run())


def rollback(
    domain: Domain,
    identity: Annotated[
        str | None,
        typer.Argument(
            metavar="ID", help="As listed by `deployments`; default: the one that was live before"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Go back to an earlier deployment; the one that is live now is kept. Ctrl-C undoes it."""

    async def run() -> DeploymentRecord:
        async with client_of(url, token) as client:
            begun = await (await tenant_of(client, domain)).rollback(identity)
            return await followed(begun, domain, as_json=as_json)

    record = ended(run())
    if not as_json:
        out.say(f"{record.url} is {record.all['rollback']} again, after {(record.ms or 0) / 1000:.2f} s")


def env(
    domain: Domain,
    action: Annotated[Action, typer.Argument(help="What to do")] = Action.LIST,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE … | NAME …]",
            help="Variables to set or unset; without any, `set` reads .env lines from standard input",
        ),
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="List the values too.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """List, set or unset a site's variables. A change restarts the site without failing a request."""
    given = words or []
    if action is Action.LIST:
        if given:
            raise typer.BadParameter("list takes no names")
        asyncio.run(_list(domain, values=values, as_json=as_json, url=url, token=token))
        return
    changes: Mapping[str, str | None]
    if action is Action.SET:
        changes = dict(_assignment(entry) for entry in given or _lines())
    else:
        changes = dict.fromkeys(given)
    if not changes:
        raise typer.BadParameter(f"{action} takes at least one variable")

    async def run() -> DeploymentRecord:
        async with client_of(url, token) as client:
            begun = await (await tenant_of(client, domain)).change_environment(changes)
            return await followed(begun, domain, as_json=as_json)

    record = ended(run())
    if not as_json:
        done = "has" if action is Action.SET else "has no more"
        names = ", ".join(sorted(changes))
        out.say(f"{record.url} {done} {line(names)}, after {(record.ms or 0) / 1000:.2f} s")


async def _list(domain: str, *, values: bool, as_json: bool, url: str | None, token: str | None) -> None:
    async with client_of(url, token) as client:
        tenant = await tenant_of(client, domain)
        found: Mapping[str, str | None]
        if values:
            found = await tenant.environment()
        else:
            found = dict.fromkeys(await tenant.variables())
    if as_json:
        out.json(found if values else list(found), indent=True)
        return
    if not found:
        err.say(f"{domain} has no variables; `incus-gateway env {domain} set NAME=VALUE` gives it one")
    for name, value in sorted(found.items()):
        out.say(name if value is None else f"{name}={line(value)}")


def _lines() -> list[str]:
    """Return the assignments on standard input, since a command line shows in the list of processes."""
    if at_terminal():
        raise typer.BadParameter(
            "set takes NAME=VALUE arguments, or such lines on standard input: env … set <.env"
        )
    found = (entry.strip() for entry in sys.stdin.read().splitlines())
    return [entry.removeprefix("export ") for entry in found if entry and not entry.startswith("#")]


def _assignment(entry: str) -> tuple[str, str]:
    name, equals, value = entry.partition("=")
    if not equals:
        raise typer.BadParameter(f"set takes NAME=VALUE, not {entry!r}")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return name.strip(), value[1:-1] if quoted else value


def _what(record: DeploymentRecord) -> str:
    said = record.all
    if said["rollback"]:
        return f"rollback to {said['rollback']}"
    if said["env"]:
        return line(f"env {', '.join(said['env'])}")
    return str(said["template"])


def _state(record: DeploymentRecord) -> str:
    """Return a deployment's state in a word; one that was undone says why."""
    if record.error is None:
        return record.state
    return "cancelled" if record.error.code == "cancelled" else "failed"


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
