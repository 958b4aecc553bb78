"""Tasks: start one at once, complete one despite a cancel, keep one running, log what fails."""

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

_PAUSES: Final = (1.0, 60.0)  # seconds before a failed job is restarted: the first and the longest pause
_CLOSED_HANDLE: Final = "the handler is closed"  # uvloop's UVHandle._ensure_alive
_LONG: Final = 10  # times as long as it had paused before: what breaks off then is another failure


def begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Return a task that has already run up to its first wait, which saves a turn of the loop.

    Before Python 3.12 it has not started yet.
    """
    if sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True)
    return asyncio.create_task(work)


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Complete `work`, which must be bounded; a cancel of this task takes effect after its end."""
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


async def run_forever(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a job for as long as the process, restarting it after an error."""
    loop, pause = asyncio.get_running_loop(), 0.0
    while True:
        began = loop.time()
        try:
            return await work()
        except GatewayError as error:
            pause = next_pause(pause, loop.time() - began)
            log.warning("%s failed: %s; it starts again in %.0f s", name, error.message, pause)
        except Exception:
            pause = next_pause(pause, loop.time() - began)
            log.exception("%s failed; it starts again in %.0f s", name, pause)
        await asyncio.sleep(pause)


def next_pause(last: float, ran: float) -> float:
    """Return the seconds to wait after a failure: twice as long as before it, unless the job ran for long."""
    first, longest = _PAUSES
    return first if not last or ran > _LONG * last else min(last * 2, longest)


@contextlib.contextmanager
def log_errors(what: str) -> Iterator[None]:
    """Let one of many fail: its error is logged, and the others continue."""
    try:
        yield
    except GatewayError as error:
        log.warning("%s failed: %s", what, error.message)
    except Exception:
        log.exception("%s failed", what)


def log_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what failed in the event loop with nothing awaiting it, unless a TLS connection was already closed.

    uvloop answers what it has just read without checking whether the connection has been lost meanwhile
    (`SSLProtocol._process_outgoing`), and reports that as a fault. The connection's owner learns of the loss.
    """
    error = context.get("exception")
    lost = isinstance(error, RuntimeError) and str(error).endswith(_CLOSED_HANDLE)
    if not (lost and "SSL" in context["message"]):
        loop.default_exception_handler(context)
