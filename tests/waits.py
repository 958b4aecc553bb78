"""How tests wait where no event can be awaited: by turns of the loop, or by looking until a deadline."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Final

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


def until_true(condition: Callable[[], bool], deadline: float = 30.0, *, every: float = 0.02) -> None:
    """Do the same as `until` where there is no loop."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(every)
