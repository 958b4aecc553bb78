"""Events, filters, the journal and the bus: a published event arrives, or its loss is reported."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import InvalidParams
from gateway.events import (
    GAP,
    Bus,
    Draft,
    Event,
    Filter,
    Journal,
    MemoryJournal,
    StoredJournal,
    Subscription,
)
from gateway.events import (
    journal as journals,
)
from gateway.events.bus import BATCH
from gateway.events.event import numbered
from gateway.storage.store import FILE, Store
from tests.unit.test_store import Held
from tests.waits import settled, turn, until

ALL = Filter()


def event(type: str = "exec.started", tenant: str | None = "shop", deployment: str | None = None) -> Event:
    return numbered(Draft(type, "/gateway/t", 0.0, tenant, deployment), 1)


Make = Callable[..., Awaitable[Journal]]


@pytest.fixture(params=["memory", "stored"])
async def make(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Make]:
    """Return a factory of empty journals, for each kind, because the bus must see no difference."""
    monkeypatch.setattr(journals, "_RECENT", 32)  # so that most reads are of the disk
    async with AsyncExitStack() as stack:

        async def one(kept: int = 1000, kept_bytes: int = 1 << 26) -> Journal:
            if request.param == "memory":
                return MemoryJournal(kept, kept_bytes)
            store = await stack.enter_async_context(Store(tmp_path))
            return await stack.enter_async_context(stored(store, kept=kept, kept_bytes=kept_bytes))

        yield one


def stored(
    store: Store,
    kept: int = 1000,
    kept_bytes: int = 1 << 26,
    age: float = 4e9,  # these tests' events are of 1970
    waiting: int = 10_000,
) -> StoredJournal:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journals, "WAITING", waiting)
        return StoredJournal(store, kept=kept, kept_bytes=kept_bytes, age=age)


async def settle(journal: Journal) -> None:
    """Wait until appended events are readable."""
    await until(lambda: journal.settled, every=0)


async def read(journal: Journal, after: int, limit: int = 100) -> tuple[int, int, list[int]]:
    stretch = await journal.read(after, limit)
    return stretch.start, stretch.end, [event.id for event in stretch.events]


async def take(subscription: Subscription, count: int) -> list[Event]:
    async with asyncio.timeout(10):
        return [await anext(subscription) for _ in range(count)]


async def rest(subscription: Subscription) -> list[Event]:
    async with asyncio.timeout(10):
        return [event async for event in subscription]


# --- values ------------------------------------------------------------------------------------------


def test_an_event_is_a_cloudevent() -> None:
    made = numbered(Draft("exec.exited", "/gateway/host1", 1764032523.1234, "shop", None, {"exitCode": 0}), 7)
    assert json.loads(made.encoded) == {
        "specversion": "1.0",
        "id": "7",
        "source": "/gateway/host1",
        "type": "exec.exited",
        "subject": "shop",
        "time": "2025-11-25T01:02:03.123Z",
        "data": {"exitCode": 0},
    }


def test_an_event_of_no_tenant_has_no_subject() -> None:
    assert "subject" not in json.loads(event("gateway.ready", None).encoded)


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


async def test_a_journal_gives_growing_ids_and_keeps_the_last(make: Make) -> None:
    journal = await make(3)
    first = journal.newest + 1
    assert journal.oldest == first
    assert await read(journal, journal.newest) == (first - 1, first - 1, [])
    assert [made.id for made in journal.append(drafts(5))] == [first + n for n in range(5)]
    await settle(journal)
    assert (journal.oldest, journal.newest) == (first + 2, first + 4)
    assert await read(journal, first - 50) == (first + 1, first + 4, [first + 2, first + 3, first + 4])
    assert await read(journal, first + 1) == (first + 1, first + 4, [first + 2, first + 3, first + 4])
    assert await read(journal, first + 2, 1) == (first + 2, first + 3, [first + 3])
    assert await read(journal, first + 4) == (first + 4, first + 4, [])


async def test_a_journal_is_bounded_in_bytes_too(make: Make) -> None:
    journal = await make(1000, kept_bytes=10_000)
    last = journal.append(drafts(50, size=1000))[-1].id
    await settle(journal)
    _, end, kept = await read(journal, journal.oldest - 1)
    assert 8 <= len(kept) <= 10
    assert kept[-1] == end == last


async def test_a_long_stretch_that_nobody_wants_is_read_in_parts(make: Make) -> None:
    journal = await make(5000)
    made = journal.append([Draft("t", "/gateway/t", 0.0, "shop" if n == 1999 else None) for n in range(2000)])
    await settle(journal)
    at, parts = made[0].id - 1, []
    wanted = Filter(tenants=frozenset({"shop"}))
    while at < journal.newest:
        stretch = await journal.read(at, 10, wanted)
        assert stretch.start == at < stretch.end
        at = stretch.end
        parts.append([event.id for event in stretch.events])
    assert len(parts) == 4
    assert parts[-1] == [made[-1].id] and not any(parts[:-1])


def test_a_later_life_has_higher_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the clock advances, which is what the ids rely on."""
    before = MemoryJournal(10)
    before.append(drafts(1))
    assert time.time() * 1000 - 60_000 < before.newest < 2**53
    later = journals.clock() + 3
    monkeypatch.setattr(journals, "clock", lambda: later)
    assert MemoryJournal(10).newest > before.newest


async def test_what_is_not_json_is_refused_and_leaves_no_hole(make: Make) -> None:
    journal = await make()
    before = journal.newest
    with pytest.raises(TypeError):
        journal.append([*drafts(2), Draft("t", "/gateway/t", 0.0, data={"x": object()})])
    (made,) = journal.append(drafts(1))
    await settle(journal)
    assert made.id == before + 1
    assert await read(journal, before) == (before, made.id, [made.id])


# --- whose events are kept ---------------------------------------------------------------------------


async def replayed(bus: Bus, filter: Filter, after: int) -> list[Event]:
    """Return the events so far for a subscriber resuming after an id, without the one published to end it."""
    mark = bus.publish("mark", "mark")
    everything = replace(
        filter,
        coverage=None if filter.coverage is None else filter.coverage | {"mark"},
        tenants=None if filter.tenants is None else filter.tenants | {"mark"},
        deployments=None,
    )
    if filter.deployments is not None:
        mark = bus.publish("mark", "mark", deployment="d-mark")
        everything = replace(filter, deployments=filter.deployments | {"d-mark"}, tenants=None)
    found = list[Event]()
    async with asyncio.timeout(10):
        async for event in bus.subscribe(everything, after):
            if event.id == mark.id:
                break
            found.append(event)
    return [event for event in found if event.type != "mark"]


@pytest.mark.parametrize("size", [0, 2000])
async def test_one_tenants_events_push_out_its_own_alone(make: Make, size: int) -> None:
    """Whether many or large. Others' events are replayed without a gap, its own and everybody's with one."""
    journal = await make(20 if size == 0 else 1000, kept_bytes=1 << 26 if size == 0 else 20_000)
    bus = Bus(journal, "t")
    quiet = [bus.publish(f"q{n}", "quiet", deployment="d-quiet") for n in range(3)]
    nobodys = bus.publish("gateway.ready")
    for n in range(200):
        bus.publish(f"g{n}", "greedy", {"x": "x" * size}, deployment="d-greedy" if n == 0 else None)
    await settle(journal)
    assert await replayed(bus, ALL, journal.newest) == []  # whoever has read so far has lost nothing
    for filter, expected in (
        (Filter(frozenset({"quiet"})), [*quiet[1:], nobodys]),
        (Filter(None, frozenset({"quiet"})), quiet[1:]),
        (Filter(frozenset({"quiet", "greedy"}), frozenset({"quiet"})), quiet[1:]),
        (Filter(None, None, frozenset({"d-quiet"})), quiet[1:]),
    ):
        assert await replayed(bus, filter, quiet[0].id) == expected
    for filter in (
        *(Filter(frozenset({"greedy"})), Filter(frozenset({"quiet", "greedy"})), ALL),
        *(Filter(None, frozenset({"greedy"})), Filter(None, None, frozenset({"d-greedy"}))),
    ):
        got = await replayed(bus, filter, quiet[0].id)
        assert got[0].type == GAP and GAP not in [event.type for event in got[1:]]
        assert [event.id for event in got[1:]] == sorted(event.id for event in got[1:])


async def test_a_slow_reader_of_a_quiet_tenant_gets_no_gap_by_anothers_flood(make: Make) -> None:
    journal = await make(BATCH)
    bus = Bus(journal, "t")
    slow, both = (
        bus.subscribe(Filter(names)) for names in (frozenset({"quiet"}), frozenset({"quiet", "greedy"}))
    )
    made = [bus.publish("q", "quiet", {"n": n}) for n in range(5)]
    for _ in range(BATCH * 5):
        bus.publish("g", "greedy")
    await settle(journal)
    assert await take(slow, 5) == made
    got = await take(both, 6)
    assert (got[0].type, got[1:]) == (GAP, made)
    # each loss is told once, and a later one again, though it is of earlier events
    await take(both, BATCH - 5)
    lagging = bus.subscribe(Filter(frozenset({"quiet", "greedy"})), after=made[0].id)
    assert [event.type for event in await take(lagging, 2)] == [GAP, "q"]
    for _ in range(BATCH * 2):
        bus.publish("q", "quiet")
    await settle(journal)
    assert GAP in [event.type for event in await take(lagging, BATCH)]


async def test_losses_outlive_the_process(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        async with stored(store, kept=10) as journal:
            bus = Bus(journal, "t")
            quiet = [bus.publish("q", "quiet") for n in range(2)]
            for _ in range(100):
                bus.publish("g", "greedy")
            await settle(journal)
        async with stored(store, kept=10) as journal:
            bus = Bus(journal, "t")
            assert await replayed(bus, Filter(frozenset({"quiet"})), quiet[0].id) == quiet[1:]
            got = await replayed(bus, Filter(frozenset({"greedy"})), quiet[0].id)
            assert got[0].type == GAP


async def test_losses_of_many_tenants_are_told_in_bounded_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest losses then count for everybody: there may be a gap too many, but never one too few."""
    monkeypatch.setattr("gateway.events.journal._LOSSES", 20)
    async with Store(tmp_path) as store, stored(store, kept=10) as journal:
        bus = Bus(journal, "t")
        first = bus.publish("first", "t0")
        for n in range(100):
            bus.publish("e", f"t{n}")
            await settle(journal)
        assert len(journal._losses) <= 22
        ((kept,),) = await store.read(lambda db: db.execute("SELECT count(*) FROM losses").fetchall())
        assert kept == len(journal._losses)
        for n in (0, 50, 85):
            got = await replayed(bus, Filter(frozenset({f"t{n}"})), first.id)
            assert [event.type for event in got] == [GAP]


async def test_what_was_lost_while_it_waited_counts_beside_what_is_no_longer_kept(tmp_path: Path) -> None:
    """Even if both are of one tenant and recorded together."""
    async with Store(tmp_path) as store, stored(store, kept=5, waiting=5) as journal:
        bus = Bus(journal, "t")
        made = [bus.publish("e", "shop") for _ in range(5)]
        await settle(journal)
        await store.write(lambda db: db.execute("PRAGMA max_page_count=1").fetchall())
        lost = bus.publish("large", "shop", {"x": "x" * 100_000})
        await until(lambda: journal.failed is not None)
        for _ in range(5):
            bus.publish("e", "shop")
        await store.write(lambda db: db.execute("PRAGMA max_page_count=1048576").fetchall())
        await until(lambda: journal.failed is None)
        got = await take(bus.subscribe(Filter(frozenset({"shop"})), after=made[-1].id), 2)
        assert (got[0].type, got[1].id) == (GAP, lost.id + 1)


async def test_one_tenant_does_not_push_out_what_waits_for_a_full_disk(tmp_path: Path) -> None:
    async with Store(tmp_path) as store, stored(store, waiting=20) as journal:
        bus = Bus(journal, "t")
        first = bus.publish("first", "quiet")
        await settle(journal)
        await store.write(lambda db: db.execute("PRAGMA max_page_count=1").fetchall())
        quiet = [bus.publish("q", "quiet", {"x": "x" * 50_000}) for _ in range(3)]
        await until(lambda: journal.failed is not None)
        for _ in range(100):
            bus.publish("g", "greedy")
        await store.write(lambda db: db.execute("PRAGMA max_page_count=1048576").fetchall())
        await until(lambda: journal.failed is None)
        assert await replayed(bus, Filter(frozenset({"quiet"})), first.id) == quiet
        got = await replayed(bus, Filter(frozenset({"greedy"})), first.id)
        assert [event.type for event in got] == [GAP, *["g"] * 17]


# --- the bus -----------------------------------------------------------------------------------------


async def test_publish_returns_the_event_and_subscribers_get_it(make: Make) -> None:
    bus = Bus(await make(4), "t")
    one, two = bus.subscribe(ALL), bus.subscribe(ALL)
    published = bus.publish("exec.started", "shop", {"exec": "e1"}, deployment="d1")
    assert (published.tenant, published.deployment) == ("shop", "d1")
    assert published.data == {"exec": "e1", "deployment": "d1"}
    assert await take(one, 1) == await take(two, 1) == [published]


async def test_a_subscriber_that_waits_is_woken(make: Make) -> None:
    bus = Bus(await make(4), "t")
    subscription = bus.subscribe(ALL)
    waiting = asyncio.ensure_future(take(subscription, 1))
    await turn()
    assert not waiting.done()
    published = bus.publish("a")
    assert await waiting == [published]


async def test_a_subscription_starts_when_it_is_made(make: Make) -> None:
    bus = Bus(await make(4), "t")
    before = bus.publish("before")
    subscription = bus.subscribe(ALL)
    assert subscription.last_id <= before.id
    between = bus.publish("between")
    assert await take(subscription, 1) == [between]


async def test_after_replays_what_came_later(make: Make) -> None:
    bus = Bus(await make(4), "t")
    first, second = bus.publish("a"), bus.publish("b")
    subscription = bus.subscribe(ALL, after=first.id)
    third = bus.publish("c")
    assert await take(subscription, 2) == [second, third]
    assert subscription.last_id == third.id


async def test_only_matching_events_arrive_and_the_place_moves_on(make: Make) -> None:
    bus = Bus(await make(1000), "t")
    subscription = bus.subscribe(Filter(frozenset({"shop"}), types=("exec.*",)))
    for _ in range(BATCH * 3):
        bus.publish("exec.started", "blog")
    wanted = bus.publish("exec.started", "shop")
    bus.publish("tool.started", "shop")
    bus.close()
    assert await rest(subscription) == [wanted]
    assert subscription.last_id == bus.newest


@pytest.mark.parametrize("after", [-(10**9), -50, 1, 5000])
async def test_what_is_gone_or_was_never_ours_is_a_gap_first(make: Make, after: int) -> None:
    """Relative to the first event's id: long gone, gone, just gone, and of another process."""
    journal = await make(3)
    bus = Bus(journal, "t")
    made = [bus.publish(name) for name in "abcdef"]
    await settle(journal)
    got = await take(bus.subscribe(ALL, after=made[0].id + after), 4)
    assert (got[0].type, got[0].data, got[0].id) == (GAP, {"oldest": made[3].id}, made[2].id)
    assert got[1:] == made[3:]


@pytest.mark.parametrize("after", [2, 5])
async def test_no_gap_where_nothing_is_missing(make: Make, after: int) -> None:
    journal = await make(3)
    bus = Bus(journal, "t")
    made = [bus.publish(name) for name in "abcdef"]
    await settle(journal)
    after += made[0].id
    subscription = bus.subscribe(ALL, after=after)
    bus.close()
    assert await rest(subscription) == [seen for seen in made if seen.id > after]


async def test_a_gap_passes_every_filter_and_resuming_from_it_misses_nothing(make: Make) -> None:
    journal = await make(3)
    bus = Bus(journal, "t")
    for name in "abcdef":
        bus.publish(name, "shop")
    await settle(journal)
    (gap,) = await take(bus.subscribe(Filter(frozenset(), types=("none",)), after=1), 1)
    bus.close()
    assert [seen.type for seen in await rest(bus.subscribe(ALL, after=gap.id))] == ["d", "e", "f"]


async def test_a_slow_subscriber_gets_a_gap_and_never_silence(make: Make) -> None:
    bus = Bus(await make(BATCH), "t")
    subscription = bus.subscribe(ALL)
    bus.publish("first")
    assert [seen.type for seen in await take(subscription, 1)] == ["first"]
    made = [bus.publish(f"e{n}") for n in range(BATCH * 3)]
    got = await take(subscription, BATCH + 1)
    assert got[0].type == GAP
    assert got[1:] == made[-BATCH:]


async def test_a_burst_reaches_all_and_a_stalled_one_holds_nothing(make: Make) -> None:
    bus = Bus(await make(5000), "t")
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


async def test_close_delivers_what_was_published_and_ends_all(make: Make) -> None:
    bus = Bus(await make(4), "t")
    waiting, late = bus.subscribe(ALL), bus.subscribe(ALL)
    task = asyncio.ensure_future(rest(waiting))
    await turn()
    last = bus.publish("gateway.draining")
    bus.close()
    bus.close()
    assert await task == [last]
    assert await rest(late) == [last]
    assert await rest(bus.subscribe(ALL)) == []
    assert bus.publish("after").id == last.id + 1
    assert bus.subscribers == 0


@pytest.mark.parametrize("waits", [True, False])
async def test_one_that_finishes_returns_what_was_published_before(make: Make, waits: bool) -> None:
    bus = Bus(await make(1000), "t")
    one, other = bus.subscribe(ALL), bus.subscribe(ALL)
    reading = asyncio.ensure_future(rest(one))
    if waits:
        await turn()
    published = [bus.publish("a") for _ in range(2 * BATCH)]
    one.finish()
    assert await reading == published
    assert bus.subscribers == 1 and len(await other.batch()) > 0
    bus.close()


async def test_one_subscription_can_be_closed_alone(make: Make) -> None:
    bus = Bus(await make(4), "t")
    one, two = bus.subscribe(ALL), bus.subscribe(ALL)
    tasks = [asyncio.ensure_future(rest(subscription)) for subscription in (one, two)]
    await turn()
    one.close()
    assert await tasks[0] == []
    assert bus.subscribers == 1
    published = bus.publish("a")
    bus.close()
    assert await tasks[1] == [published]


async def test_cancelling_a_waiting_reader_loses_nothing(make: Make) -> None:
    bus = Bus(await make(4), "t")
    subscription = bus.subscribe(ALL)
    task = asyncio.ensure_future(anext(subscription))
    await turn()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    published = bus.publish("a")
    assert await take(subscription, 1) == [published]


async def test_data_of_the_publisher_is_copied(make: Make) -> None:
    data: dict[str, Any] = {"n": 1}
    published = Bus(await make()).publish("a", None, data)
    data["n"] = 2
    assert published.data == {"n": 1}


# --- the journal in the store --------------------------------------------------------------------------


async def test_nothing_is_seen_before_it_is_written(tmp_path: Path) -> None:
    """A crash cannot revoke events that were seen."""
    async with Store(tmp_path) as store, stored(store) as journal:
        bus = Bus(journal, "t")
        subscription = bus.subscribe(ALL)
        async with Held(store):
            task = asyncio.ensure_future(take(subscription, 2))
            before, made = journal.newest, [bus.publish("a"), bus.publish("b")]
            assert bus.subscribe(ALL).last_id == before  # no id that a crash would give to another event
            assert made[1].id == made[0].id + 1  # ids are there at once
            await until(lambda: not store._writer._asked.empty())  # they are to be written next
            await settled()
            assert not task.done() and not journal.settled
        assert await task == made


async def test_events_and_ids_outlive_the_process(tmp_path: Path) -> None:
    async with Store(tmp_path) as store, stored(store) as journal:
        bus = Bus(journal, "t")
        made = [bus.publish("a", "shop", {"n": n}, "d1") for n in range(10)]
    async with Store(tmp_path) as store, stored(store) as journal:
        bus = Bus(journal, "t")
        assert (journal.oldest, journal.newest) == (made[0].id, made[-1].id)
        later = bus.publish("b")
        assert later.id == made[-1].id + 1
        assert await take(bus.subscribe(ALL, after=made[3].id), 7) == [*made[4:], later]


async def test_old_events_go_and_the_newest_stays(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        async with stored(store) as journal:
            made = journal.append(drafts(5))
        async with stored(store, age=60) as journal:  # all are of 1970
            await until(lambda: journal.oldest == made[-1].id)
            later = Bus(journal, "t").publish("new")
            await settle(journal)
            assert await read(journal, made[0].id) == (later.id - 1, later.id, [later.id])
        async with stored(store) as journal:
            assert (journal.oldest, journal.newest) == (later.id, later.id)


async def test_after_a_power_cut_ids_jump_and_a_gap_says_so(tmp_path: Path) -> None:
    """The last commits may be lost, and with them ids that subscribers have seen."""
    async with Store(tmp_path) as store:
        async with stored(store) as journal:
            before = journal.append(drafts(2))
        # no boot is noted after an orderly end: another boot is nothing to fear then
        assert await store.read(lambda db: db.execute("SELECT boot FROM journal").fetchone()) == (None,)
        await store.write(lambda db: db.execute("UPDATE journal SET boot = 'another'").rowcount)
        async with stored(store) as journal:
            bus = Bus(journal, "t")
            after = bus.publish("after")
            assert after.id > before[-1].id + 10_000
            await settle(journal)
            got = await take(bus.subscribe(ALL, after=before[0].id), 3)
            assert [event.type for event in got] == [GAP, "t", "after"]
            assert [event.id for event in got[1:]] == [before[1].id, after.id]
            (seen, *_) = await take(bus.subscribe(ALL, after=before[1].id), 1)
            assert (seen.type, seen.data) == (GAP, {"oldest": after.id})


async def test_events_of_tool_calls_wait_for_others_while_nobody_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until somebody does, another event comes, or the bus closes. The gateway's own followers wait too."""
    monkeypatch.setattr(journals, "_GATHER", 0)
    monkeypatch.setattr(journals, "_SPACING", 0)
    monkeypatch.setattr(journals, "_UNFOLLOWED", 3600)
    async with Store(tmp_path) as store, stored(store) as journal:
        bus = Bus(journal, "t")
        own = bus.subscribe(ALL, patient=True)

        async def waits() -> bool:
            for _ in range(3):  # whatever was begun before is in the file after that
                await settled()
                await store.write(lambda connection: None)
            return not journal.settled

        first = bus.publish("exec.started")
        assert await take(own, 1) == [first]
        calls = [bus.publish("tool.finished"), bus.publish("tool.started")]
        assert await waits()
        with contextlib.closing(bus.subscribe(Filter(types=("none",)))):
            assert await take(own, 2) == calls
            followed = bus.publish("tool.finished")
            assert await take(own, 1) == [followed]
        calls = [bus.publish("tool.started")]
        assert await waits()
        calls.append(bus.publish("exec.started"))
        assert await take(own, 2) == calls
        last = bus.publish("tool.finished")
        assert await waits()
        bus.close()
        assert await rest(own) == [last]


async def test_a_hand_over_waits_for_no_flush_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the two processes does, and a power cut after it is noticed all the same."""
    flushed = list[bool]()

    async with Store(tmp_path) as store:
        write = store.write

        async def noted(work: Any, *, durable: bool = False) -> Any:
            flushed.append(durable)
            return await write(work, durable=durable)

        async with stored(store) as journal:
            monkeypatch.setattr(store, "write", noted)
            before = journal.append(drafts(2))
            await journal.close(handing_over=True)
        async with stored(store) as journal:
            (after,) = journal.append(drafts(1))
            assert after.id == before[-1].id + 1
            await journal.close(handing_over=True)
        assert flushed and not any(flushed)
        await store.write(lambda db: db.execute("UPDATE journal SET boot = 'another'").rowcount)
        async with stored(store) as journal:
            (later,) = journal.append(drafts(1))
            assert later.id > after.id + 10_000


async def test_the_latest_of_a_type_are_found_among_many_others(make: Make) -> None:
    bus = Bus(await make(kept=4000), "t")
    bus.publish("rare")
    among = [bus.publish("rare" if number % 900 == 0 else "other") for number in range(2000)]
    await bus.recorded(among[-1])
    assert await bus.latest(len(among), "rare") == [among[0], among[900], among[1800]]
    assert await bus.latest(100_000, "other") == [event for event in among if event.type == "other"]


async def test_a_full_disk_stops_no_publisher_and_ends_in_a_gap(tmp_path: Path) -> None:
    async def pages(count: int) -> None:
        await store.write(lambda db: db.execute(f"PRAGMA max_page_count={count}").fetchall())

    async with Store(tmp_path) as store, stored(store, waiting=5) as journal:
        bus = Bus(journal, "t")
        subscription = bus.subscribe(ALL)
        first = bus.publish("first")
        await bus.recorded(first)
        assert await store.read(lambda db: db.execute("SELECT max(id) FROM events").fetchone()) == (first.id,)
        assert await take(subscription, 1) == [first]
        await pages(1)
        lost = bus.publish("large", data={"x": "x" * 100_000})
        await until(lambda: journal.failed is not None)
        assert journal.failed is not None and journal.failed.facts == {"reason": "disk_full"}
        await bus.recorded(lost)  # waits for no room
        waiting = [bus.publish("small") for _ in range(5)]
        assert journal.newest == first.id
        await pages(1 << 20)
        got = await take(subscription, 6)
        assert (got[0].type, got[0].id, got[0].data) == (GAP, lost.id, {"oldest": waiting[0].id})
        assert got[1:] == waiting
        await until(lambda: journal.failed is None)
        assert await rest_of(bus) == []


async def test_what_waits_for_room_needs_no_other_event_to_be_written(tmp_path: Path) -> None:
    async with Store(tmp_path) as store, stored(store) as journal:
        bus = Bus(journal, "t")
        await store.write(lambda db: db.execute("PRAGMA max_page_count=1").fetchall())
        large = bus.publish("large", data={"x": "x" * 100_000})
        await until(lambda: journal.failed is not None)
        failed = journal.failed
        await until(lambda: journal.failed is not failed)  # tried again, while nothing more came
        await store.write(lambda db: db.execute("PRAGMA max_page_count=100000").fetchall())
        assert (await take(bus.subscribe(ALL, after=large.id - 1), 1))[-1].id == large.id


async def test_a_full_disk_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        async with stored(store) as journal:
            bus = Bus(journal, "t")
            await store.write(lambda db: db.execute("PRAGMA max_page_count=1").fetchall())
            following = asyncio.ensure_future(rest(bus.subscribe(ALL)))
            bus.publish("large", data={"x": "x" * 100_000})
            bus.close()
            assert await following == []


async def rest_of(bus: Bus) -> list[Event]:
    bus.close()
    return await rest(bus.subscribe(ALL))


_PUBLISHER = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from gateway.events import Bus, Filter, StoredJournal
from gateway.storage.store import Store

async def main():
    async with Store(Path(sys.argv[1])) as store:
        async with StoredJournal(store, kept=100_000, kept_bytes=1 << 30, age=1e6) as journal:
            bus = Bus(journal)
            seen = bus.subscribe(Filter(), after=journal.newest)

            async def publish():
                while True:
                    for _ in range(3):
                        bus.publish("t", "shop", {"life": sys.argv[2]})
                    while len(journal._waiting) > 500:
                        await asyncio.sleep(0)
                    await asyncio.sleep(0)

            publishing = asyncio.ensure_future(publish())
            async for event in seen:
                sys.stdout.buffer.write(b"%d %s\\n" % (event.id, event.encoded))
                sys.stdout.buffer.flush()

asyncio.run(main())
"""


def test_what_a_subscriber_saw_survives_kills(tmp_path: Path) -> None:
    """No event is lost or changed and no id is reused over 8 processes, each ended by SIGKILL."""
    kills = int(os.environ.get("GATEWAY_TEST_KILLS", "4"))
    seen: dict[int, bytes] = {}
    for life in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", _PUBLISHER, str(tmp_path), str(life)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        for _ in range(random.choice((1, 3, 50, 700))):
            _note(seen, process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        *whole, _cut = process.stdout.read().split(b"\n")
        for line in whole:
            _note(seen, line)
        process.wait()
        process.stdout.close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as found:
        kept = dict(found.execute("SELECT id, encoded FROM events"))
    assert len(seen) >= kills
    assert {number: kept.get(number) for number in seen} == seen


def _note(seen: dict[int, bytes], line: bytes) -> None:
    number, _, encoded = line.strip().partition(b" ")
    assert seen.setdefault(int(number), encoded) == encoded, "an id was given twice"
    assert encoded.endswith(b"}")


def test_an_event_takes_no_more_memory_than_its_text() -> None:
    """The latest are kept in memory, and bytes as returned by orjson take 4 KiB each, however short."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        events = [event() for _ in range(100)]
        assert (tracemalloc.get_traced_memory()[0] - before) / len(events) < 1000
    finally:
        tracemalloc.stop()
