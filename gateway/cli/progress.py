"""A deployment's progress, on a terminal or as plain lines."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from gateway.deployments.record import PHASES
from gateway.terminal import Output, line
from gateway.terminal.drawing import Console
from gateway_client import Deployment, DeploymentRecord

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
Told = Callable[[Mapping[str, Any]], None]


async def follow(deployment: Deployment, told: Told) -> DeploymentRecord:
    """Pass each event of a deployment to a function as `{type, **data}`, and return the final record.

    If the task is cancelled, cancel the deployment, and raise once it is undone.
    """
    try:
        async for event in deployment.events():
            told({"type": event.type, "time": event.time, **event.data})
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
class Progress:
    """A deployment as lines that are redrawn while it runs. Use as a context manager around `follow`."""

    console: Output
    domain: str
    lines: dict[str, _Line] = field(default_factory=lambda: {name: _Line() for name in PHASES})
    last: str = ""
    undoing: bool = False
    detected: list[str] = field(default_factory=list)
    printed: deque[str] = field(default_factory=lambda: deque(maxlen=_PRINTED))
    """The last lines of output that were printed."""
    _live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(self, console=Console(), refresh_per_second=12)
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self.last = ""
            self._live.__exit__(*error)

    def told(self, event: Mapping[str, Any]) -> None:
        """Take one event; without a terminal, print a line for those worth it."""
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
