"""What the log says of failures in the event loop that nobody awaits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.errors import Unavailable
from gateway.server.handover import log_unless_handed_over
from gateway.tasks import log_failure

CLOSED = RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
TLS = "Fatal error on SSL protocol"


@pytest.mark.parametrize(
    ("context", "logged"),
    [
        ({"message": TLS, "exception": CLOSED}, False),
        ({"message": TLS, "exception": RuntimeError("another")}, True),
        ({"message": TLS, "exception": ValueError("the handler is closed")}, True),
        ({"message": "Task exception was never retrieved", "exception": CLOSED}, True),
        ({"message": "no exception"}, True),
    ],
)
async def test_a_lost_connection_is_no_failure_of_ours(
    context: dict[str, Any], logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    log_failure(asyncio.get_running_loop(), context)
    assert (context["message"] in caplog.text) == logged


@pytest.mark.parametrize(
    ("error", "logged"), [(Unavailable("the records are a successor's"), False), (OSError(), True)]
)
async def test_a_predecessor_says_nothing_of_records_that_are_its_successors(
    error: Exception, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    log_unless_handed_over(asyncio.get_running_loop(), {"message": "a task failed", "exception": error})
    assert ("a task failed" in caplog.text) == logged
