"""`python -m tests.lag serve`: a gateway that notes what each callback of its event loop takes of the CPU.

That is how long a neighbour waits for the loop on a machine with nothing else to do, and unlike the time on
the wall it is the same on a busy one. asyncio's loop stands in for uvloop, whose callbacks cannot be watched.
What took more than `NOTED` is written to the file `GATEWAY_TEST_LAG` as it happens, a line of JSON for each.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

NOTED: Final = 0.01  # seconds


@dataclass(frozen=True, slots=True)
class Callback:
    """One callback: when it began and ended, in the host's monotonic time, and its seconds of CPU."""

    began: float
    ended: float
    cpu: float
    what: str


def noted(file: Path) -> list[Callback]:
    """Return the callbacks that a gateway has noted so far."""
    return [Callback(*json.loads(line)) for line in file.read_text().splitlines()]


def watch(file: Path) -> None:
    """Note the callbacks of every loop of this process from now on."""
    out = file.open("a", buffering=1)
    run = asyncio.Handle._run

    def measured(handle: asyncio.Handle) -> None:
        began, before = time.monotonic(), time.thread_time()
        run(handle)
        if (cpu := time.thread_time() - before) > NOTED:
            out.write(json.dumps([began, time.monotonic(), cpu, repr(handle)[:500]]) + "\n")

    replaced: Any = asyncio.Handle
    replaced._run = measured
    uvloop.new_event_loop = asyncio.new_event_loop  # type: ignore[assignment]  # as asyncio's callers see it


if __name__ == "__main__":
    from gateway.cli.main import main

    watch(Path(os.environ["GATEWAY_TEST_LAG"]))
    main()
