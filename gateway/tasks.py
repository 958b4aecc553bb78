"""Knows how a task begins without waiting for its turn, and how one is carried through."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Return a task that has run up to its first wait, so that what waits for a turn is one thing less.

    Before Python 3.12 it has not begun.
    """
    if sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True)
    return asyncio.create_task(work)


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Carry `work`, which bounds itself, through; a cancel of this task meanwhile is told after its end."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen; whoever cancelled wants to know nothing of it
        raise cancelled
    return task.result()
