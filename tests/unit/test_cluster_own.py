"""What a gateway tells its peers of its own tenants, and when."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gateway.cluster import listener
from gateway.cluster.listener import Own
from gateway.cluster.peers import Known
from gateway.errors import Unavailable


async def test_nobody_is_told_that_these_are_all_before_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers keep what they knew of a server that is just starting, whose Incus does not answer yet."""
    monkeypatch.setattr(listener, "BEAT", 0.01)
    answers: list[Unavailable | list[Known]] = [
        Unavailable("incusd is starting"),
        [Known("shop", status="running")],
    ]
    answering = asyncio.Event()

    async def listed() -> list[Known]:
        await answering.wait()
        if isinstance(answer := answers.pop(0), Unavailable):
            raise answer
        return answer

    telling = Own(listed, {"member": "m1"})
    looking = asyncio.create_task(telling.look())
    try:
        async with asyncio.timeout(30), contextlib.aclosing(telling.follow(asyncio.Event())) as told:
            assert (await anext(told))["member"] == "m1"
            assert [await anext(told) for _ in range(3)] == [{}, {}, {}]
            answering.set()
            while not (line := await anext(told)):
                pass
            assert [one["name"] for one in line["tenants"]] == ["shop"]
            assert await anext(told) == {"whole": True}
            assert not answers  # the one that failed was soon repeated
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_that_there_are_none_is_told_too() -> None:
    """Else peers would wait for ever for the tenants of a new server."""

    async def listed() -> list[Known]:
        return []

    telling = Own(listed, {"member": "m1"})
    looking = asyncio.create_task(telling.look())
    try:
        async with asyncio.timeout(30), contextlib.aclosing(telling.follow(asyncio.Event())) as told:
            assert (await anext(told))["member"] == "m1"
            while not (line := await anext(told)):
                pass
            assert line == {"whole": True}
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
