"""How tests wait where no event can be awaited: by turns of the loop, or by looking until a deadline."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

_LOOKS: Final = 5
_CHAIN: Final = 100  # wake-ups one after the other; those of the tests have under 20


async def turn() -> None:
    """Let all that is ready run up to its next wait: a task just started begins, one woken goes on."""
    await asyncio.sleep(0)


async def settled() -> None:
    """Return once everything is as far as it gets without time, threads and other processes.

    What has not happened by then does not happen before one of those does something.
    """
    for _ in range(_CHAIN):
        await turn()


async def until(
    condition: Callable[[], object | Awaitable[object]], deadline: float = 30.0, *, every: float = 0.02
) -> None:
    """Look until `condition()` holds: for what the kernel or another process does and tells nobody.

    Look again after `every` seconds; with 0 at each turn of the loop, for what only lasts a moment.
    """
    end = time.monotonic() + deadline
    while True:
        holds = condition()
        if await holds if inspect.isawaitable(holds) else holds:
            return
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(every)


async def until_time(moment: float) -> None:
    """Return once the wall clock shows more than `moment`: what ends by it has ended then."""
    while (left := moment - time.time()) >= 0:
        await asyncio.sleep(left + 0.01)


async def pause(seconds: float) -> None:
    """Let time pass where that is what a test is about.

    As the pace of a slow peer, a stretch that is measured, a moment amid what another process
    does. No result may depend on its being enough.
    """
    await asyncio.sleep(seconds)


async def standstill(
    count: Callable[[], Awaitable[int]], deadline: float = 60.0, *, every: float = 0.1
) -> int:
    """Return what `count` gives once several looks in a row find the same, more than 0."""
    before, same = -1, 0
    end = time.monotonic() + deadline
    while same < _LOOKS:
        assert time.monotonic() < end, "it does not stand still"
        now = await count()
        same = same + 1 if now == before > 0 else 0
        before = now
        await asyncio.sleep(every)
    return before


def until_true(condition: Callable[[], bool], deadline: float = 30.0, *, every: float = 0.02) -> None:
    """Do the same as `until` where there is no loop."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(every)


class Gate:
    """A FIFO in a workspace at which a worker of `test_rootfs_probes` stops: so a test sees it at work."""

    def __init__(self, workspace: Path, name: str = "gate") -> None:
        self._path = workspace / name
        os.mkfifo(self._path)
        self._path.chmod(0o666)
        self._end: int | None = None

    async def reached(self) -> None:
        """Return once a worker stands at it."""
        opening = asyncio.get_running_loop().run_in_executor(None, os.open, self._path, os.O_WRONLY)
        try:
            async with asyncio.timeout(30):
                self._end = await asyncio.shield(opening)
        except BaseException:
            os.close(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK))  # or the thread would wait for ever
            os.close(await opening)
            raise

    def open(self) -> None:
        """Let the worker go on."""
        assert self._end is not None
        os.close(self._end)
        self._end = None
