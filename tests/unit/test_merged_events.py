"""The stream over all members alone: its pace, and its end. The peers' answers are made here."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from gateway.cluster.events import MergedEvents, PeerStream
from gateway.cluster.peers import Peer, Peers
from gateway.events import Bus, Filter, MemoryJournal, positions
from gateway.events.event import Draft, numbered, source
from gateway.events.sse import sent
from tests.waits import until


class Answer:
    """A peer's endless answer: an event each time it is read. `taken` counts them."""

    def __init__(self, last: int) -> None:
        self.headers = {"Last-Event-ID": str(last)}
        self.taken, self.closed = 0, False
        self.broken: BaseException | None = None
        self._last = last
        self.content = self

    async def readany(self) -> bytes:
        await asyncio.sleep(0)
        if self.broken is not None:
            raise self.broken
        self.taken += 1
        return sent(numbered(Draft("t", source("m2"), 0.0), self._last + self.taken))

    def set_exception(self, error: BaseException) -> None:
        self.broken = error

    def close(self) -> None:
        self.closed = True


class Others:
    """One peer, `m2`, and what is asked of it."""

    def __init__(self) -> None:
        self.all = {"m2": Peer("m2")}
        self.watchers: set[Any] = set()
        self.answers: list[Answer] = []
        self.asked: list[int | None] = []
        self.there = asyncio.Event()
        self.there.set()

    async def answer(self, peer: Peer, after: int | None) -> Answer:
        await self.there.wait()
        self.asked.append(after)
        self.answers.append(Answer(7 if after is None else after))
        return self.answers[-1]


def merged(others: Others, last: str | None = None) -> tuple[Bus, MergedEvents]:
    bus = Bus(MemoryJournal(100, first=1), "m1")
    peers, standing = cast(Peers, others), cast(PeerStream, others)
    return bus, MergedEvents(bus, Filter(), "m1", peers, standing, last)


async def test_a_client_that_takes_nothing_has_one_part_of_each_member_waiting() -> None:
    others = Others()
    bus, stream = merged(others)
    await stream.begin()
    for _ in range(1000):
        bus.publish("own")
    for _ in range(100):
        await asyncio.sleep(0)
    assert others.answers[0].taken <= 2
    parts = stream.parts()
    told = b"".join([await anext(parts) for _ in range(200)])
    assert others.answers[0].taken <= 202
    numbers = [int(line.split(b":")[3]) for line in told.split(b"\n") if line.startswith(b"id: ")]
    assert numbers[-1] > 100 and numbers == sorted(numbers)  # m2's; and m1's own in between
    assert told.count(b"event: own") > 30
    stream.end()


async def test_the_end_of_the_stream_ends_what_is_asked_of_peers() -> None:
    others = Others()
    _, stream = merged(others)
    await stream.begin()
    parts = stream.parts()
    await anext(parts)
    stream.close()
    await until(lambda: others.answers[0].closed)
    assert not others.watchers
    async with asyncio.timeout(30):
        assert len([part async for part in parts]) <= 2  # what was under way


async def test_an_answer_that_breaks_is_asked_for_again_where_it_was() -> None:
    others = Others()
    _, stream = merged(others, "m1:0,m2:40")
    await stream.begin()
    parts = stream.parts()
    told = [await anext(parts) for _ in range(5)]
    for cut in list(others.all["m2"].cut):
        cut()
    while len(others.asked) < 2:
        told.append(await anext(parts))
    assert others.asked == [40, 40 + others.answers[0].taken] and others.answers[0].closed
    told += [await anext(parts) for _ in range(5)]
    begun = [part.split(b"\n")[0] for part in told]
    assert begun == [b"id: m1:0,m2:%d" % number for number in range(41, 41 + len(told))]
    stream.end()


async def test_a_member_whose_silence_broke_its_answer_off_is_away_at_once() -> None:
    """It has been silent for as long as others get."""
    others = Others()
    _, stream = merged(others)
    await stream.begin()
    parts = stream.parts()
    others.there.clear()
    for cut in list(others.all["m2"].cut):
        cut()
    async with asyncio.timeout(30):
        while b"event: away" not in await anext(parts):
            pass
    others.there.set()
    async with asyncio.timeout(30):
        told = [await anext(parts) for _ in range(2)]
    assert b"event: back" in told[0] and b"event: t\n" in told[1]
    stream.end()


@pytest.mark.parametrize(
    ("last", "asked", "gaps"), [("m1:0,m2:3", [3], 0), ("m1:0", [None], 1), ("12", [0], 0), (None, [None], 0)]
)
async def test_a_member_without_a_position_begins_with_a_gap(
    last: str | None, asked: list[int | None], gaps: int
) -> None:
    """Unless the stream begins here."""
    others = Others()
    _, stream = merged(others, last)
    await stream.begin()
    assert others.asked == asked
    parts = stream.parts()
    told = [await anext(parts) for _ in range(5)]
    assert sum(b"event: gap" in part and b"/gateway/m2" in part for part in told) == gaps
    stream.end()


@pytest.mark.parametrize(
    "hostile", ["12", "m9:1,m8:2", ",".join(f"m{number}:1" for number in range(9, 999)), "m2:" + "9" * 9999]
)
async def test_an_id_names_nobody_but_the_members_whatever_it_resumes(hostile: str) -> None:
    others = Others()
    _, stream = merged(others, hostile)
    await stream.begin()
    parts = stream.parts()
    told = b"".join([await anext(parts) for _ in range(9)])
    ids = [line[4:].decode() for line in told.split(b"\n") if line.startswith(b"id: ")]
    assert set(positions.vector(ids[-1]) or {}) == {"m1", "m2"}
    stream.end()


async def test_members_come_and_go() -> None:
    others = Others()
    _, stream = merged(others)
    await stream.begin()
    assert stream.at == {"m1": 0, "m2": 7}
    del others.all["m2"]
    for changed in others.watchers:
        changed()
    await until(lambda: others.answers[0].closed)
    others.all["m3"] = Peer("m3")
    for changed in others.watchers:
        changed()
    parts = stream.parts()
    while b"event: gap" not in (part := await anext(parts)):
        pass
    id_ = part.split(b"\n")[0].removeprefix(b"id: ").decode()
    assert (positions.vector(id_) or {})["m3"] == 7
    stream.end()


async def test_a_client_goes_on_from_a_former_home_and_at_the_new_one_from_its_arrival() -> None:
    """Other members are not asked, and nothing is told as missed."""
    others = Others()
    others.all["m3"] = Peer("m3")
    bus = Bus(MemoryJournal(100, first=1), "m1")
    for kind in ("before", "moved", "after"):
        bus.publish(kind)
    stream = MergedEvents(
        *(bus, Filter(), "m1", cast(Peers, others), cast(PeerStream, others), "m2:40"),
        only={"m2": 40},
        begin=1,
    )
    await stream.begin()
    assert (stream.at, others.asked) == ({"m1": 1, "m2": 40}, [40])
    parts, told = stream.parts(), b""
    while b"event: after" not in told or b"event: t\n" not in told:
        told += await anext(parts)
    assert b"event: moved" in told and not any(kind in told for kind in (b"event: gap", b"event: before"))
    assert stream.at["m1"] == 3 and stream.at["m2"] > 40
    stream.end()
