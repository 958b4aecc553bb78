"""Events, filters, the journal and the bus: what is published arrives, or its loss is told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from gateway.errors import InvalidParams
from gateway.events import GAP, Bus, Draft, Event, Filter, Journal, MemoryJournal, Subscription
from gateway.events.bus import BATCH
from gateway.events.event import numbered

ALL = Filter()


def event(type: str = "exec.started", tenant: str | None = "shop", deployment: str | None = None) -> Event:
    return numbered(Draft(type, "/gateway/t", 0.0, tenant, deployment), 1)


def small(kept: int = 4, first: int = 100) -> Bus:
    return Bus(MemoryJournal(kept, first=first), "t")


async def take(subscription: Subscription, count: int) -> list[Event]:
    async with asyncio.timeout(10):
        return [await anext(subscription) for _ in range(count)]


async def rest(subscription: Subscription) -> list[Event]:
    async with asyncio.timeout(10):
        return [event async for event in subscription]


# --- values ------------------------------------------------------------------------------------------


def test_an_event_is_a_cloudevent() -> None:
    made = numbered(Draft("exec.exited", "/gateway/host1", 1764032523.1234, "shop", None, {"exitCode": 0}), 7)
    assert made.cloudevent() == {
        "specversion": "1.0",
        "id": "7",
        "source": "/gateway/host1",
        "type": "exec.exited",
        "subject": "shop",
        "time": "2025-11-25T01:02:03.123Z",
        "data": {"exitCode": 0},
    }
    assert json.loads(made.encoded) == made.cloudevent()


def test_an_event_of_no_tenant_has_no_subject() -> None:
    assert "subject" not in event("gateway.ready", None).cloudevent()


@pytest.mark.parametrize(
    ("filter", "seen", "matches"),
    [
        (ALL, event(), True),
        (Filter(frozenset({"shop"})), event(), True),
        (Filter(frozenset({"blog"})), event(), False),
        (Filter(frozenset({"sho"})), event(), False),
        (Filter(frozenset()), event("gateway.ready", None), True),
        (Filter(tenants=frozenset({"shop"})), event(), True),
        (Filter(tenants=frozenset({"blog"})), event(), False),
        (Filter(tenants=frozenset({"shop"})), event("gateway.ready", None), False),
        # asking for a tenant does not widen what the token covers
        (Filter(frozenset({"blog"}), frozenset({"shop"})), event(), False),
        (Filter(deployments=frozenset({"d1"})), event(deployment="d1"), True),
        (Filter(deployments=frozenset({"d1"})), event(deployment="d12"), False),
        (Filter(deployments=frozenset({"d1"})), event(), False),
        (Filter(types=("exec.started",)), event(), True),
        (Filter(types=("exec.start",)), event(), False),
        (Filter(types=("exec.*",)), event(), True),
        (Filter(types=("tool.*", "exec.*")), event(), True),
        (Filter(types=("exec*",)), event("execution.x"), True),
        (Filter(types=("exec.*",)), event("execution.x"), False),
        (Filter(types=("*",)), event(), True),
        (Filter(types=("*.started",)), event(), False),
        (Filter(types=()), event(), False),
    ],
)
def test_filter(filter: Filter, seen: Event, matches: bool) -> None:
    assert filter.matches(seen) is matches


def test_a_filter_is_read_from_a_query() -> None:
    assert Filter.parse(None, "a, b", "", "exec.*,tool.started,") == Filter(
        None, frozenset({"a", "b"}), None, ("exec.*", "tool.started")
    )
    assert Filter.parse(frozenset({"a"})) == Filter(frozenset({"a"}))


@pytest.mark.parametrize("query", [{"tenant": ",".join("x" * 65)}, {"type": "t" * 257}])
def test_a_filter_is_bounded(query: dict[str, str]) -> None:
    with pytest.raises(InvalidParams):
        Filter.parse(None, **query)


# --- the journal -------------------------------------------------------------------------------------


def drafts(count: int, size: int = 0) -> list[Draft]:
    return [Draft("t", "/gateway/t", 0.0, data={"n": n, "x": "x" * size}) for n in range(count)]


async def test_a_journal_gives_growing_ids_and_keeps_the_last() -> None:
    journal = MemoryJournal(3, first=10)
    assert (journal.oldest, journal.newest) == (10, 9)
    assert await journal.read(0, 10) == []
    assert [made.id for made in journal.append(drafts(5))] == [10, 11, 12, 13, 14]
    assert (journal.oldest, journal.newest) == (12, 14)
    assert [kept.id for kept in await journal.read(0, 10)] == [12, 13, 14]
    assert [kept.id for kept in await journal.read(12, 1)] == [13]
    assert await journal.read(14, 10) == []
    assert await journal.read(99, 10) == []


async def test_a_journal_is_bounded_in_bytes_too() -> None:
    journal = MemoryJournal(1000, kept_bytes=10_000, first=1)
    journal.append(drafts(50, size=1000))
    kept = await journal.read(0, 1000)
    assert 8 <= len(kept) <= 10
    assert kept[-1].id == 50
    journal.append(drafts(1, size=100_000))  # one that is too large alone is not kept, and that shows
    assert (journal.oldest, journal.newest) == (52, 51)
    assert await journal.read(0, 10) == []


def test_a_later_life_has_higher_ids() -> None:
    before = MemoryJournal(10)
    before.append(drafts(1))
    assert time.time() * 1000 - 60_000 < before.newest < 2**53
    time.sleep(0.003)  # the clock must have moved: the very thing that the ids rely on
    assert MemoryJournal(10).newest > before.newest


async def test_what_is_not_json_is_refused_and_leaves_no_hole() -> None:
    journal = MemoryJournal(10, first=1)
    with pytest.raises(TypeError):
        journal.append([*drafts(2), Draft("t", "/gateway/t", 0.0, data={"x": object()})])
    assert (journal.oldest, journal.newest) == (1, 0)


# --- the bus -----------------------------------------------------------------------------------------


async def test_publish_returns_the_event_and_subscribers_get_it() -> None:
    bus = small()
    one, two = bus.subscribe(ALL), bus.subscribe(ALL)
    published = bus.publish("exec.started", "shop", {"exec": "e1"}, deployment="d1")
    assert (published.id, published.tenant, published.deployment) == (100, "shop", "d1")
    assert published.data == {"exec": "e1", "deployment": "d1"}
    assert await take(one, 1) == await take(two, 1) == [published]


async def test_a_subscriber_that_waits_is_woken() -> None:
    bus = small()
    subscription = bus.subscribe(ALL)
    waiting = asyncio.ensure_future(take(subscription, 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    published = bus.publish("a")
    assert await waiting == [published]


async def test_a_subscription_starts_when_it_is_made() -> None:
    bus = small()
    bus.publish("before")
    subscription = bus.subscribe(ALL)
    between = bus.publish("between")
    assert await take(subscription, 1) == [between]


async def test_after_replays_what_came_later() -> None:
    bus = small()
    first, second = bus.publish("a"), bus.publish("b")
    subscription = bus.subscribe(ALL, after=first.id)
    third = bus.publish("c")
    assert await take(subscription, 2) == [second, third]
    assert subscription.last_id == third.id


async def test_only_matching_events_arrive_and_the_place_moves_on() -> None:
    bus = small(kept=1000)
    subscription = bus.subscribe(Filter(frozenset({"shop"}), types=("exec.*",)))
    for _ in range(BATCH * 3):
        bus.publish("exec.started", "blog")
    wanted = bus.publish("exec.started", "shop")
    bus.publish("tool.started", "shop")
    bus.close()
    assert await rest(subscription) == [wanted]
    assert subscription.last_id == bus.newest


@pytest.mark.parametrize("after", [0, 50, 101, 5000])
async def test_what_is_gone_or_was_never_ours_is_a_gap_first(after: int) -> None:
    bus = small(kept=3)
    made = [bus.publish(name) for name in "abcdef"]
    got = await take(bus.subscribe(ALL, after=after), 4)
    assert (got[0].type, got[0].data, got[0].id) == (GAP, {"oldest": 103}, 102)
    assert got[1:] == made[3:]


@pytest.mark.parametrize("after", [102, 105])
async def test_no_gap_where_nothing_is_missing(after: int) -> None:
    bus = small(kept=3)
    made = [bus.publish(name) for name in "abcdef"]
    subscription = bus.subscribe(ALL, after=after)
    bus.close()
    assert await rest(subscription) == [seen for seen in made if seen.id > after]


async def test_a_gap_passes_every_filter_and_resuming_from_it_misses_nothing() -> None:
    bus = small(kept=3)
    for name in "abcdef":
        bus.publish(name, "shop")
    (gap,) = await take(bus.subscribe(Filter(frozenset(), types=("none",)), after=1), 1)
    bus.close()
    assert [seen.type for seen in await rest(bus.subscribe(ALL, after=gap.id))] == ["d", "e", "f"]


async def test_a_slow_subscriber_gets_a_gap_and_never_silence() -> None:
    bus = small(kept=BATCH)
    subscription = bus.subscribe(ALL)
    bus.publish("first")
    assert [seen.type for seen in await take(subscription, 1)] == ["first"]
    made = [bus.publish(f"e{n}") for n in range(BATCH * 3)]
    got = await take(subscription, BATCH + 1)
    assert got[0].type == GAP
    assert got[1:] == made[-BATCH:]


async def test_a_burst_reaches_all_and_a_stalled_one_holds_nothing() -> None:
    bus = small(kept=5000)
    active = [bus.subscribe(ALL) for _ in range(20)]
    stalled = bus.subscribe(ALL)
    first = bus.publish("first")
    assert await take(stalled, 1) == [first]
    readers = [asyncio.ensure_future(take(subscription, 3001)) for subscription in active]
    made = [first, *(bus.publish("e", "shop", {"n": n}) for n in range(3000))]
    for got in await asyncio.gather(*readers):
        assert got == made
    assert len(stalled._ready) == 0
    assert await take(stalled, 3000) == made[1:]
    assert len(stalled._ready) <= BATCH


async def test_close_delivers_what_was_published_and_ends_all() -> None:
    bus = small()
    waiting, late = bus.subscribe(ALL), bus.subscribe(ALL)
    task = asyncio.ensure_future(rest(waiting))
    await asyncio.sleep(0)
    last = bus.publish("gateway.draining")
    bus.close()
    bus.close()
    assert await task == [last]
    assert await rest(late) == [last]
    assert await rest(bus.subscribe(ALL)) == []
    assert bus.publish("after").id == last.id + 1
    assert bus.subscribers == 0


async def test_one_subscription_can_be_closed_alone() -> None:
    bus = small()
    one, two = bus.subscribe(ALL), bus.subscribe(ALL)
    tasks = [asyncio.ensure_future(rest(subscription)) for subscription in (one, two)]
    await asyncio.sleep(0)
    one.close()
    assert await tasks[0] == []
    assert bus.subscribers == 1
    published = bus.publish("a")
    bus.close()
    assert await tasks[1] == [published]


async def test_cancelling_a_waiting_reader_loses_nothing() -> None:
    bus = small()
    subscription = bus.subscribe(ALL)
    task = asyncio.ensure_future(anext(subscription))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    published = bus.publish("a")
    assert await take(subscription, 1) == [published]


class LateJournal(MemoryJournal):
    """Gives ids at once and makes events readable later, as one on disk does."""

    def __init__(self) -> None:
        super().__init__(100, first=1)
        self._written = 0

    @property
    def newest(self) -> int:
        return self._written

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        grown, self._grown = self._grown, lambda: None
        try:
            return super().append(drafts)
        finally:
            self._grown = grown

    async def read(self, after: int, limit: int) -> list[Event]:
        await asyncio.sleep(0)
        return [seen for seen in await super().read(after, limit) if seen.id <= self._written]

    def written(self) -> None:
        self._written = self._newest
        self._grown()


async def test_a_journal_that_writes_later_fits_the_same_bus() -> None:
    """Nothing reaches a subscriber before it is written: a crash cannot take back what was seen."""
    late = LateJournal()
    journal: Journal = late
    bus = Bus(journal, "t")
    subscription = bus.subscribe(ALL)
    task = asyncio.ensure_future(take(subscription, 2))
    made = [bus.publish("a"), bus.publish("b")]
    assert [seen.id for seen in made] == [1, 2]
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    late.written()
    assert await task == made


def test_data_of_the_publisher_is_copied() -> None:
    data: dict[str, Any] = {"n": 1}
    published = small().publish("a", None, data)
    data["n"] = 2
    assert published.data == {"n": 1}
