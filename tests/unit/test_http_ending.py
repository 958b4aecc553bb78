"""What a request is answered that takes longer than the server has for its end."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.api.http import with_request_id

_SCOPE = {"type": "http", "method": "POST", "path": "/v1/tenants/shop/tools/Bash", "headers": []}


async def ended(*first: Message) -> list[Message]:
    """Return what is sent for a request that never ends, after `first`, once the server cancels it."""
    sent, waiting = list[Message](), asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        for message in first:
            await send(message)
        waiting.set()
        await asyncio.Event().wait()

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    app: Any = with_request_id(endless)
    serving = asyncio.create_task(app(dict(_SCOPE), receive, send))
    await waiting.wait()
    serving.cancel()
    await serving
    return sent


async def test_it_is_told_to_ask_again() -> None:
    """As by a gateway that takes no new work, so that a call with a key is made once by the next process."""
    start, body = await ended()
    headers = dict(start["headers"])
    assert (start["status"], headers[b"retry-after"]) == (503, b"2")
    said = orjson.loads(body["body"])
    assert (said["code"], said["retryAfterMs"]) == ("unavailable", 2000)


async def test_an_answer_that_has_begun_breaks_off() -> None:
    begun: Message = {"type": "http.response.start", "status": 200, "headers": []}
    with pytest.raises(asyncio.CancelledError):
        await ended(begun)
