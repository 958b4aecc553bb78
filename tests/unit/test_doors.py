"""Calls to a tenant that changes its home wait, bounded, and none that is under way is forgotten."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import RateLimited, Unavailable
from gateway.lifecycle.doors import Doors
from tests.waits import turn


async def test_an_open_door_keeps_nobody() -> None:
    own = Doors()
    await own.wait("shop")
    own.close("other")
    await own.wait("shop")
    assert own.closed("other") and not own.closed("shop")


async def test_who_waits_goes_on_when_it_opens() -> None:
    own = Doors()
    own.close("shop")
    waiting = [asyncio.create_task(own.wait("shop")) for _ in range(3)]
    await turn()
    assert not any(task.done() for task in waiting)
    own.open("shop")
    await asyncio.gather(*waiting)
    await own.wait("shop")


async def test_who_waits_too_long_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.lifecycle.doors.PATIENCE", 0.01)
    own = Doors()
    own.close("shop")
    with pytest.raises(Unavailable) as refused:
        await own.wait("shop")
    assert refused.value.facts["reason"] == "moving"


async def test_no_more_wait_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.lifecycle.doors.WAITING", 2)
    own = Doors()
    own.close("shop")
    own.close("other")
    waiting = [asyncio.create_task(own.wait("shop")) for _ in range(2)]
    await turn()
    with pytest.raises(RateLimited):
        await own.wait("shop")
    another = asyncio.create_task(own.wait("other"))  # whose share is its own
    await turn()
    assert not another.done()
    waiting.pop().cancel()
    await turn()
    waiting.append(asyncio.create_task(own.wait("shop")))
    await turn()
    own.open("shop")
    own.open("other")
    await asyncio.gather(*waiting, another)


async def test_calls_under_way_are_waited_for_a_while() -> None:
    own = Doors()
    assert await own.empty("shop", 0)
    with own.inside("shop"):
        with own.inside("shop"):
            assert not await own.empty("shop", 0.01)
            waiting = asyncio.create_task(own.empty("shop", 30))
            await turn()
        await turn()
        assert not waiting.done()
    assert await waiting


async def test_what_stays_open_outlives_the_closing_until_it_is_ended() -> None:
    own, ended = Doors(), list[str]()
    with own.stream("shop", lambda: ended.append("shop")), own.stream("other", lambda: ended.append("other")):
        with own.stream("shop", lambda: ended.append("over")):
            pass
        own.close("shop")
        assert ended == []  # they tell what the close causes
        own.end_streams("shop")
    own.end_streams("other")
    assert ended == ["shop"]
