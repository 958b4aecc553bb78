"""Incus's events are taken from the socket as they come, and kept for a slow reader up to a limit."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import orjson
import pytest

from gateway.incus import IncusError
from gateway.incus.monitor import heard


class Session:
    """Tells so many events at once, numbered, and breaks off."""

    def __init__(self, events: int) -> None:
        self.events = events

    @contextlib.asynccontextmanager
    async def ws_connect(self, url: str, **_: Any) -> AsyncIterator[AsyncIterator[Any]]:
        yield self._messages()

    async def _messages(self) -> AsyncIterator[Any]:
        for number in range(self.events):
            yield SimpleNamespace(type=aiohttp.WSMsgType.TEXT, data=orjson.dumps({"number": number}))


async def told(events: int, found: list[int], noted: list[int]) -> None:
    listens = list[bool]()
    session = cast(Any, Session(events))
    stream = heard(
        session,
        {},
        lambda event: event["number"] % 2 == 0,
        lambda event: noted.append(event["number"]),
        listens.append,
    )
    async with contextlib.aclosing(stream) as stream:
        assert await anext(stream) == {"type": "connected"}
        async for event in stream:
            found.append(event["number"])  # noqa: PERF401 - what came before the end counts
    assert listens == [True, False]


async def test_who_reads_slowly_gets_all_that_is_wanted() -> None:
    found, noted = list[int](), list[int]()
    await told(7, found, noted)
    assert found == noted == [0, 2, 4, 6]


async def test_more_than_may_wait_breaks_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all is read anew; nothing of a tenant's makes the gateway keep ever more."""
    monkeypatch.setattr("gateway.incus.monitor._WAITING", 3)
    found = list[int]()
    with pytest.raises(IncusError, match="faster than they are read"):
        await told(100, found, [])
    assert found == [0, 2, 4]
