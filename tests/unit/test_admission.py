"""One admission counts everything: within its limits, in fair turns, and nothing of it is ever lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import Admission, Reservation, _Waiter
from gateway.errors import RateLimited
from tests.waits import settled, turn


def test_limits_are_of_parts_owners_and_all_and_the_full_one_is_named() -> None:
    admission = Admission[str]("watches", each=3, total=5, part=2, hint="end some")
    for _ in range(2):
        admission.reserve("a", part=1)
    with pytest.raises(RateLimited, match=r"this connection has too many watches .*; end some") as caught:
        admission.reserve("a", part=1)
    assert caught.value.facts["limit"] == 2 and caught.value.facts["retry_after"] > 0
    third = admission.reserve("a", part=2)
    with pytest.raises(RateLimited, match="this tenant"):
        admission.reserve("a", part=2)
    for _ in range(2):
        admission.reserve("b")
    with pytest.raises(RateLimited, match="this gateway"):
        admission.reserve("c")
    third.release()
    third.release()
    assert (admission.held, admission.of("a"), admission.most) == (4, 2, 2)
    admission.reserve("c")


def test_what_is_too_large_is_admitted_alone() -> None:
    admission = Admission[str]("bytes", each=4, total=8)
    with admission.reserve("a", 20), pytest.raises(RateLimited):
        admission.reserve("b", 1)
    assert admission.held == 0


def test_the_oldest_of_the_owner_with_most_is_displaced() -> None:
    admission, gone = Admission[str]("sockets", each=9, total=4), list[str]()
    for name in ("a1", "b1", "b2"):
        admission.reserve(name[0], displaced=lambda name=name: gone.append(name))  # type: ignore[misc]
    admission.reserve("c")  # is nobody's to take
    admission.reserve("d", displaced=lambda: None)
    assert gone == ["b1"] and admission.held == 4
    with pytest.raises(RateLimited):
        admission.reserve("e")


async def test_a_light_owner_waits_for_one_turn_of_a_heavy_one() -> None:
    admission, order = Admission[str]("looks", each=8, total=1), list[str]()

    async def use(owner: str) -> None:
        with await admission.acquire(owner):
            order.append(owner)
            await turn()

    tasks = [asyncio.create_task(use("heavy")) for _ in range(20)]
    await turn()
    tasks.append(asyncio.create_task(use("light")))
    async with asyncio.timeout(30):
        await asyncio.gather(*tasks)
    assert order.index("light") <= 2 and len(order) == 21
    assert (admission.held, admission.waiting) == (0, 0)


async def test_a_waiter_that_is_cancelled_as_there_is_room_takes_no_turn_of_its_owner() -> None:
    admission = Admission[str]("commands", each=2, total=1)
    room = admission.reserve("a")
    gone, next_, other = (asyncio.ensure_future(admission.acquire(owner)) for owner in ("c", "c", "b"))
    await turn()
    room.release()
    gone.cancel()  # the room is given before it has left the queue
    await settled()
    assert next_.done() and not other.done()
    next_.result().release()
    (await other).release()


async def test_an_owner_at_its_limit_holds_up_nobody() -> None:
    admission = Admission[str]("publishes", each=1, total=2)
    first = await admission.acquire("a")
    waiting = asyncio.create_task(admission.acquire("a"))
    await turn()
    other = await asyncio.wait_for(admission.acquire("b"), 30)
    assert not waiting.done()
    first.release()
    (await asyncio.wait_for(waiting, 30)).release()
    other.release()
    assert (admission.held, admission.waiting) == (0, 0)


async def test_nobody_overtakes_what_is_large_until_it_gives_up() -> None:
    admission = Admission[str]("bytes", each=4, total=4)
    first = await admission.acquire("a", 3)
    large = asyncio.create_task(admission.acquire("b", 3))
    await turn()
    small = asyncio.create_task(admission.acquire("c"))
    await settled()
    assert not small.done() and admission.held == 3
    large.cancel()
    (await asyncio.wait_for(small, 30)).release()
    first.release()
    assert (admission.held, admission.waiting) == (0, 0)


async def test_a_full_queue_refuses_the_last_of_the_owner_with_most() -> None:
    admission = Admission[str]("looks", each=1, total=1, waiting=3)
    first = await admission.acquire("a")
    heavy = [asyncio.create_task(admission.acquire("a")) for _ in range(3)]
    await turn()
    with pytest.raises(RateLimited):
        await admission.acquire("a")
    light = asyncio.create_task(admission.acquire("b"))
    await turn()
    with pytest.raises(RateLimited, match="too many looks"):
        await heavy[2]
    for task in (light, *heavy[:2]):
        task.add_done_callback(lambda granted: granted.result().release())
    first.release()
    async with asyncio.timeout(30):
        await asyncio.gather(light, *heavy[:2])
    await turn()
    assert (admission.held, admission.waiting) == (0, 0)


async def test_nobody_waits_longer_than_the_patience() -> None:
    admission = Admission[str]("looks", each=1, patience=0.01)
    held = await admission.acquire("a")
    with pytest.raises(RateLimited) as caught:
        await asyncio.wait_for(admission.acquire("a"), 30)
    assert caught.value.facts["limit"] == 1
    held.release()
    assert (admission.held, admission.waiting) == (0, 0)


# --- any interleaving ----------------------------------------------------------------------------------


class _Recorded(Admission[str]):
    """Checks at each grant that limits hold and that no owner overtakes another twice."""

    def __init__(self, each: int, total: int) -> None:
        super().__init__("things", each=each, total=total)
        self.limit = each
        self.overtaken: dict[str, Counter[str]] = {}  # by owner that waits and may: who got how many

    def hold(self, owner: str, size: int = 1, *, part: Hashable = None) -> Reservation[str]:
        for waits, by in list(self.overtaken.items()):
            if waits not in self._queues or self.of(waits) >= self.limit:
                del self.overtaken[waits]  # its turn came, or it cannot have one now
            elif waits != owner:
                by[owner] += 1
                assert by[owner] <= 1, f"{owner} overtook {waits}"
        self.overtaken.pop(owner, None)
        found = super().hold(owner, size, part=part)
        self.look()
        return found

    def _left(self, waiter: _Waiter[str]) -> None:
        super()._left(waiter)
        if waiter.owner not in self._queues:  # whoever comes back stands behind the others
            self.overtaken.pop(waiter.owner, None)

    def look(self) -> None:
        assert self.held <= (self.total or 0)
        assert all(has <= self.limit for has in self._owners.values())
        for owner in self._queues:
            if self.of(owner) < self.limit:
                self.overtaken.setdefault(owner, Counter())


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.sampled_from("abc"), st.booleans()),
        st.tuples(st.sampled_from(["cancel", "release", "both"]), st.integers(0, 5), st.booleans()),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(steps=_STEPS, each=st.integers(1, 3), total=st.integers(1, 4))
def test_any_interleaving_keeps_limits_and_turns_and_loses_nothing(
    steps: list[tuple[str, Any, bool]], each: int, total: int
) -> None:
    """Takes, waits, cancels and releases in any order, also a cancel right after a grant."""
    asyncio.run(_interleaved(steps, each, total))


async def _interleaved(steps: list[tuple[str, Any, bool]], each: int, total: int) -> None:
    admission, tasks = _Recorded(each, total), list[asyncio.Task[Reservation[str]]]()
    ended = set[asyncio.Task[Reservation[str]]]()

    def release(number: int) -> None:
        held = [task for task in tasks if task.done() and not task.cancelled() and task not in ended]
        if held:
            task = held[number % len(held)]
            ended.add(task)
            task.result().release()

    for step, value, pause in steps:
        if step == "take":
            tasks.append(asyncio.create_task(admission.acquire(value)))
        if step in ("release", "both"):
            release(value)
            if step == "both":  # the grant is decided in the next iteration, the cancel arrives after it
                await turn()
        if step in ("cancel", "both") and (waiting := [task for task in tasks if not task.done()]):
            waiting[value % len(waiting)].cancel()
        if pause:
            await turn()
        admission.look()
    for _ in range(len(tasks) + 1):
        for _ in range(4):  # the grant, and what wakes up by it
            await turn()
        # while anybody may have something, it is taken: no slot is lost and nobody starves
        free = admission.total is not None and admission.held < admission.total
        able = [owner for owner in admission._queues if admission.of(owner) < each]
        assert not (free and able)
        release(0)
    assert all(task.done() for task in tasks)
    assert (admission.held, admission.waiting, admission._queues) == (0, 0, {})
    assert not admission._owners and not admission._displaceable
