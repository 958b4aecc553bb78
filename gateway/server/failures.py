"""Log what fails in the event loop without anybody awaiting it, but not what is no failure of ours."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from gateway.errors import Unavailable

_LOST: Final = "the handler is closed"  # uvloop's UVHandle._ensure_alive


def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log a failure, unless a TLS connection was already closed.

    uvloop answers what it has just read without looking whether the connection has been lost meanwhile
    (`SSLProtocol._process_outgoing`), and takes that for a fault. The connection's owner is told of the loss.
    """
    error = context.get("exception")
    lost = isinstance(error, RuntimeError) and str(error).endswith(_LOST)
    if not (lost and "SSL" in context["message"]):
        loop.default_exception_handler(context)


def report_of_predecessor(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log a failure, unless its cause is that the records now belong to the successor."""
    if not isinstance(context.get("exception"), Unavailable):
        report(loop, context)
