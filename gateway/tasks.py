"""Tasks: begin one at once, carry one through a cancel, keep one running."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar

from gateway.errors import GatewayError

log = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSES: Final = (1.0, 60.0)  # seconds, the first and the longest, until what broke is begun again


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
            task.exception()  # retrieved: the caller cancelled it
        raise cancelled
    return task.result()


async def lasting(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do what is to go on as long as the process; where an error ends it, begin again."""
    pause, longest = _PAUSES
    while True:
        try:
            return await work()
        except GatewayError as error:
            log.warning("%s broke off: %s; it begins again in %.0f s", name, error.message, pause)
        except Exception:
            log.exception("%s broke off; it begins again in %.0f s", name, pause)
        await asyncio.sleep(pause)
        pause = min(pause * 2, longest)


@contextlib.contextmanager
def apart(what: str) -> Iterator[None]:
    """Let one thing of many fail: the log has why, the others go on."""
    try:
        yield
    except GatewayError as error:
        log.warning("%s failed: %s", what, error.message)
    except Exception:
        log.exception("%s failed", what)
