"""How long the caller of a Bash command waits in front of it."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.errors import Unavailable
from gateway.settings import Settings
from gateway.shells import shells
from gateway.shells.shell_command import BashRecord
from gateway.tools.session import ToolSession
from tests.waits import pause

START = 3600.0  # seconds that the start of a command takes here


class SlowStart:
    """Stands in for `Commands`: a command takes long to start, and then ends after a moment."""

    leaving = True  # nothing is to be removed after a call

    def __init__(self) -> None:
        self.late = 0.0
        self.moved = False

    async def start(self, root: object, record: BashRecord, *_: object) -> Any:
        self.late = START
        task = asyncio.ensure_future(pause(0.05))
        return SimpleNamespace(task=task, record=record, left=False, held=True, ended=None, exec_id="x")

    async def to_background(self, *_: object) -> None:
        self.moved = True


async def test_the_timeout_counts_from_the_start_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy tenant takes its time to start a command, which is not to be in the background by then."""
    commands = SlowStart()
    monkeypatch.setattr(shells, "time", SimpleNamespace(time=lambda: time.time() + commands.late))
    tools = shells.Bash(cast(Any, commands), cast(Any, None), Settings(runtime="local"))
    given = {"command": "echo", "timeout": 30_000}
    with pytest.raises(Unavailable, match="exit was lost"):  # it has ended, and has no exit here
        await tools.run(cast(Any, None), ToolSession(), given, "x", "", None, None)
    assert not commands.moved
