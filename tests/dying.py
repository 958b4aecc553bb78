"""Runs a gateway that kills itself at one point of the first start of Bash: `dying.py POINT serve`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Final

from gateway.cli.main import main
from gateway.execs.registry import Starting
from gateway.incus import ExecSockets
from gateway.runtime import Holding

POINTS: Final = ("noted", "recorded", "told")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Have it die once a command's facts are in its memory, its call is recorded, or its line is sent."""
    note, recorded, write = Starting._note, Starting.note, ExecSockets.write

    def noted(self: Starting, holding: Holding) -> None:
        note(self, holding)
        if point == "noted" and self.purpose is not None:
            die()

    async def all_noted(self: Starting, holding: Holding | None) -> None:
        await recorded(self, holding)
        if point == "recorded" and self.purpose is not None:
            die()

    async def written(self: ExecSockets, data: bytes, **more: Any) -> None:
        await write(self, data, **more)
        if point == "told" and b"/bin/bash" in data:
            die()

    Starting._note, Starting.note, ExecSockets.write = noted, all_noted, written  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(sys.argv.pop(1))
    main()
