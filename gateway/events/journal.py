"""The interface of an event journal, and the result of a read.

Retention of events: each tenant's share of the journal, and up to which id it has lost events.

Events in memory: the latest ones of a journal, and a journal without a disk.

The event journal's SQL. The store runs each function in one of its threads.

The event journal in the gateway's store: writes events in groups, and drops the oldest.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Protocol

import orjson

from gateway.events.event import EVERYTHING, Draft, Event, Filter, numbered
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)

# events examined per read, which bounds how long it delays others if few match
SCAN: Final = 512


@dataclass(frozen=True, slots=True)
class Stretch:
    """The result of a read after an id: the matching events with `start < id <= end`.

    The journal has no events between the given id and `start`. `lost` is the number of the latest loss after
    that id that may concern the reader, or 0.
    """

    start: int
    end: int
    events: Sequence[Event]
    lost: int = 0


class Journal(Protocol):
    """Events in the order of their ids. Use it from the event loop only.

    A journal on disk assigns ids at once but makes events readable only when they are written, so that a
    crash never loses events that a subscriber has seen. So `newest` is the last readable id.

    The tenants share its capacity: when it is full, the tenant with the most events loses its oldest.
    """

    @property
    def oldest(self) -> int:
        """The id of the oldest readable event; `newest + 1` if there is none."""
        ...

    @property
    def newest(self) -> int:
        """The id of the newest readable event; if there is none yet, the id before the first."""
        ...

    @property
    def last(self) -> int:
        """The last id assigned, readable or not."""
        ...

    @property
    def losses(self) -> int:
        """Number of losses of events, counted across restarts."""
        ...

    @property
    def settled(self) -> bool:
        """Whether every appended event is readable or currently cannot be written."""
        ...

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Assign ids to drafts and keep them, without waiting; `grown` is called once they are readable."""
        ...

    async def read(self, after: int, limit: int, wanted: Filter = EVERYTHING) -> Stretch:
        """Return the next stretch after an id, with at most `limit` events; empty if there are none."""
        ...

    def watch(self, grown: Callable[[], None], followed: Callable[[], bool]) -> None:
        """Call `grown` in the loop when `newest` increases or `settled` becomes true. Only for the bus.

        `followed` returns whether somebody follows who is not the gateway itself; else events of tool calls
        may become readable a little later.
        """
        ...

    def hurry(self) -> None:
        """Make readable what waits only because nobody followed: now somebody does, or waits for its end."""
        ...


# most tenants and deployments whose losses are tracked separately
_LOSSES: Final = 10_000


class JournalEntry(NamedTuple):
    """The facts remembered about a kept event."""

    id: int
    size: int
    time: float
    deployment: str | None


class Shares:
    """The kept events of each tenant, oldest first, and the choice of which to remove.

    If there are more than `most` events or `most_bytes` bytes, the tenant with the most loses its oldest, so
    no tenant loses events because of one with more. Events without a tenant count as one tenant's.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._of: dict[str, deque[JournalEntry]] = {}
        self._bytes_of: dict[str, int] = {}
        self._count = self._bytes = 0

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether there are events above the limits."""
        return self._count > self._most or self._bytes > self._most_bytes

    @property
    def oldest(self) -> int | None:
        """The id of the oldest event, None if there is none."""
        return min((entries[0].id for entries in self._of.values()), default=None)

    def add(self, tenant: str, entry: JournalEntry) -> None:
        self._of.setdefault(tenant, deque()).append(entry)
        self._count_in(tenant, entry)

    def excess(self, newest: int, born: float) -> list[tuple[str, JournalEntry]]:
        """Remove and return events above the limits or older than `born`, but never the newest."""
        gone: list[tuple[str, JournalEntry]] = []
        for tenant in [tenant for tenant, entries in self._of.items() if entries[0].time < born]:
            while (entries := self._of.get(tenant)) and entries[0].time < born and entries[0].id != newest:
                gone.append((tenant, self.take(tenant)))
        gone += self._lighten(newest, lambda tenant: len(self._of[tenant]), lambda: self._count > self._most)
        gone += self._lighten(newest, self._bytes_of.__getitem__, lambda: self._bytes > self._most_bytes)
        return gone

    def take(self, tenant: str) -> JournalEntry:
        """Remove and return the tenant's oldest event."""
        entry = self._of[tenant].popleft()
        self._count_out(tenant, entry)
        return entry

    def restore(self, gone: Sequence[tuple[str, JournalEntry]]) -> None:
        """Put back what `excess` removed."""
        for tenant, entry in reversed(gone):
            self._of.setdefault(tenant, deque()).appendleft(entry)
            self._count_in(tenant, entry)

    def retract(self, tenant: str) -> None:
        """Remove the tenant's latest event."""
        self._count_out(tenant, self._of[tenant].pop())

    def _lighten(
        self, newest: int, weight: Callable[[str], int], too_much: Callable[[], bool]
    ) -> Iterator[tuple[str, JournalEntry]]:
        """Remove from the heaviest tenant; among equals, from the one with the oldest event."""
        if not too_much():
            return
        heap = [(-weight(tenant), entries[0].id, tenant) for tenant, entries in self._of.items()]
        heapq.heapify(heap)
        while heap and too_much():
            tenant = heap[0][2]
            if self._of[tenant][0].id != newest:
                yield tenant, self.take(tenant)
                if tenant in self._of:
                    heapq.heapreplace(heap, (-weight(tenant), self._of[tenant][0].id, tenant))
                    continue
            heapq.heappop(heap)

    def _count_in(self, tenant: str, entry: JournalEntry) -> None:
        self._count += 1
        self._bytes += entry.size
        self._bytes_of[tenant] = self._bytes_of.get(tenant, 0) + entry.size

    def _count_out(self, tenant: str, entry: JournalEntry) -> None:
        self._count -= 1
        self._bytes -= entry.size
        self._bytes_of[tenant] -= entry.size
        if not self._of[tenant]:
            del self._of[tenant], self._bytes_of[tenant]


# keys of `Losses`: for all events, and for events without a tenant; others are tenants and deployments
ALL: Final = "*"
NOBODYS: Final = ""


def _of_deployment(deployment: str) -> str:
    return f":{deployment}"  # cannot be a tenant's name


class Losses:
    """For each tenant and deployment: the id up to which events were lost, and the number of that loss.

    At most `_LOSSES` of them are tracked separately; the oldest losses then count for everybody.
    """

    def __init__(self) -> None:
        self.number = 0
        self._upto: dict[str, tuple[int, int]] = {}
        self._highest = -1

    def __len__(self) -> int:
        return len(self._upto)

    def put(self, key: str, upto: int, number: int) -> None:
        self._upto[key] = max(upto, self._upto.get(key, (upto, 0))[0]), number
        self._highest, self.number = max(self._highest, upto), max(self.number, number)

    def after(self, id: int, wanted: Filter) -> int:
        """Return the number of the latest loss after an id that may concern `wanted`, 0 if there is none."""
        if self._highest <= id:  # the subscriber is up to date
            return 0
        keys = concerned(wanted)
        found = self._upto.values() if keys is None else [self._upto.get(key, (-1, 0)) for key in keys]
        return max((number for upto, number in found if upto > id), default=0)

    def folded(self) -> tuple[list[str], int]:
        """Return the keys above the limit, and the id up to which everything then counts as lost."""
        many = len(self._upto) - _LOSSES
        if many <= 0:
            return [], 0
        oldest = heapq.nsmallest(many + _LOSSES // 10, self._upto.items(), key=lambda item: item[1])
        keys = [key for key, _ in oldest if key != ALL]
        return keys, max(upto for _, (upto, _) in oldest)

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._upto.pop(key, None)


def losses_of(gone: Iterable[tuple[str, JournalEntry]]) -> dict[str, int]:
    """Return the id up to which each tenant and deployment loses events."""
    upto: dict[str, int] = {}
    for tenant, entry in gone:
        for key in (tenant, *([] if entry.deployment is None else [_of_deployment(entry.deployment)])):
            upto[key] = max(entry.id, upto.get(key, -1))
    return upto


def concerned(wanted: Filter) -> list[str] | None:
    """Return the keys of events that may match, None for all."""
    if wanted.deployments is not None:
        return [ALL, *map(_of_deployment, wanted.deployments)]
    if wanted.tenants is not None:
        names = wanted.tenants if wanted.coverage is None else wanted.tenants & wanted.coverage
        return [ALL, *names]
    return None if wanted.coverage is None else [ALL, NOBODYS, *wanted.coverage]


def entry_of(event: Event) -> JournalEntry:
    return JournalEntry(event.id, len(event.encoded), event.time, event.deployment)


_MiB = 1 << 20


class Latest:
    """The latest events of a journal: all it keeps from the id `first` on. Ids may have gaps."""

    def __init__(self, first: int) -> None:
        self.first, self.newest = first, first - 1
        self.events: dict[int, Event] = {}  # oldest first
        self._bytes = 0

    def add(self, event: Event) -> None:
        self.events[event.id] = event
        self.newest = event.id
        self._bytes += len(event.encoded)

    def remove(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            event = self.events.pop(id_, None)
            self._bytes -= 0 if event is None else len(event.encoded)

    def trim(self, most: int, most_bytes: int) -> None:
        """Drop the oldest until there are at most `most` events with `most_bytes` of JSON."""
        while len(self.events) > most or self._bytes > most_bytes:
            oldest = next(iter(self.events))
            self.remove([oldest])
            self.first = oldest + 1

    def read(self, after: int, limit: int, wanted: Filter, lost: int) -> Stretch:
        """Return the next stretch after an id, with at most `limit` events; `lost` is passed on."""
        oldest = next(iter(self.events), self.newest + 1)
        start = end = max(after, oldest - 1)
        found: list[Event] = []
        for number in range(start + 1, min(self.newest, start + SCAN) + 1):
            end, event = number, self.events.get(number)
            if event is None:
                if start == number - 1:
                    start = number
                continue
            if wanted.matches(event):
                found.append(event)
                if len(found) == limit:
                    break
        return Stretch(start, end, found, lost)


class MemoryJournal:
    """A journal of the last `kept` events with at most `kept_bytes` of JSON, shared by the tenants.

    Nothing survives a restart. Ids start at the clock's milliseconds, so they are higher than those of the
    last process unless it constantly published more than a thousand events per second. So a client's
    `Last-Event-ID` from an earlier process is recognised as gone and never mistaken for another event. Ids
    stay far below 2**53, the limit of exact integers in JavaScript.
    """

    def __init__(self, kept: int, kept_bytes: int = 64 * _MiB, first: int | None = None) -> None:
        self._latest = Latest(clock() if first is None else first)
        self._shares, self._losses = Shares(kept, kept_bytes), Losses()
        self._losses.put(ALL, self._latest.newest, 1)
        self._grown: Callable[[], None] = lambda: None

    @property
    def oldest(self) -> int:
        return next(iter(self._latest.events), self._latest.newest + 1)

    @property
    def newest(self) -> int:
        return self._latest.newest

    @property
    def last(self) -> int:
        return self._latest.newest

    @property
    def losses(self) -> int:
        return self._losses.number

    @property
    def settled(self) -> bool:
        return True

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        # encode all before storing any: a draft that is not JSON must not leave a gap in the ids
        events = [numbered(draft, self.newest + n) for n, draft in enumerate(drafts, 1)]
        for event in events:
            self._latest.add(event)
            self._shares.add(event.tenant or NOBODYS, entry_of(event))
        gone = self._shares.excess(self.newest, 0.0)
        self._latest.remove(entry.id for _, entry in gone)
        number = self._losses.number + 1
        for key, upto in losses_of(gone).items():
            self._losses.put(key, upto, number)
        if events:
            self._grown()
        return events

    async def read(self, after: int, limit: int, wanted: Filter = EVERYTHING) -> Stretch:
        return self._latest.read(after, limit, wanted, self._losses.after(after, wanted))

    def watch(self, grown: Callable[[], None], followed: Callable[[], bool]) -> None:
        self._grown = grown

    def hurry(self) -> None:
        """Do nothing: events are readable at once."""


def clock() -> int:
    """Return the milliseconds since 1970, as a first id higher than those of earlier processes."""
    return time.time_ns() // 1_000_000


# events per statement; SQLite caches the parsed statement of each length
_ROWS: Final = 64
# events of a write with unknown outcome may exist already
_INSERT: Final = "INSERT OR IGNORE INTO events VALUES"
_LOSE: Final = (
    "INSERT INTO losses VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
    " upto = max(upto, excluded.upto), number = excluded.number"
)
_REMOVE: Final = "DELETE FROM events WHERE id IN (SELECT value FROM json_each(?))"
_FOLD: Final = "DELETE FROM losses WHERE key IN (SELECT value FROM json_each(?))"

# id, tenant, deployment, bytes, time
Row = tuple[int, str | None, str | None, int, float]


@dataclass(slots=True)
class Change:
    """A transaction of the journal: adds `events`, and deletes those with the ids in `removed`.

    `number` is the number of this loss. `lost` maps keys of `Losses` to the last id each loses. `folded` has
    the keys whose losses count for everybody from now on, and their last id.
    """

    events: Sequence[Event]
    removed: Sequence[int]
    lost: Mapping[str, int]
    number: int = 0
    folded: tuple[Sequence[str], int] = ((), 0)

    def losses(self) -> list[tuple[str, int, int]]:
        """Return the rows of the table `losses`: key, last lost id, number of the loss."""
        found = dict(self.lost)
        if self.folded[0]:
            found[ALL] = max(self.folded[1], found.get(ALL, -1))
        return [(key, upto, self.number) for key, upto in found.items()]

    def write(self, connection: sqlite3.Connection) -> None:
        """Add and delete the events, and record the losses."""
        # Many rows per statement, because the thread releases and retakes the GIL at each statement, right in
        # the middle of the calls that the events are about.
        for rows in (self.events[at : at + _ROWS] for at in range(0, len(self.events), _ROWS)):
            connection.execute(
                f"{_INSERT} {', '.join(['(?, ?, ?, ?, ?, ?, ?)'] * len(rows))}",
                [
                    field
                    for event in rows
                    for field in (
                        *(event.id, event.time, event.type, event.source),
                        *(event.tenant, event.deployment, event.encoded),
                    )
                ],
            )
        if self.removed:
            connection.execute(_REMOVE, (_listed(self.removed),))
        if self.folded[0]:
            connection.execute(_FOLD, (_listed(self.folded[0]),))
        for row in self.losses():
            connection.execute(_LOSE, row)


def _listed(values: Iterable[int | str]) -> str:
    return orjson.dumps(list(values)).decode()


def noted_boot(connection: sqlite3.Connection) -> str | None:
    """Return the boot of the machine in which the last gateway may have written what is not on disk yet."""
    found = connection.execute("SELECT boot FROM journal").fetchone()
    return None if found is None else found[0]


def begin_process(connection: sqlite3.Connection, boot: str, clock: int) -> None:
    """Record that a gateway writes in this boot of the machine."""
    connection.execute("INSERT OR REPLACE INTO journal VALUES (1, ?)", (boot,))
    connection.execute(
        "INSERT OR IGNORE INTO losses VALUES (?, coalesce((SELECT min(id) - 1 FROM events), ?), 1)",
        (ALL, clock),
    )


def end_process(connection: sqlite3.Connection) -> None:
    """Record that the gateway is shutting down and everything it wrote is on disk."""
    connection.execute("UPDATE journal SET boot = NULL")


def read_ends(
    connection: sqlite3.Connection,
) -> tuple[int | None, int | None, list[tuple[str, int, int]]]:
    """Return the ids of the first and the last event, None without any, and the losses."""
    first, last = connection.execute(
        "SELECT (SELECT min(id) FROM events), (SELECT max(id) FROM events)"
    ).fetchone()
    return first, last, connection.execute("SELECT key, upto, number FROM losses").fetchall()


def read_kept(connection: sqlite3.Connection) -> list[Row]:
    """Return a row per event, oldest first."""
    return connection.execute(
        "SELECT id, tenant, deployment, length(encoded), time FROM events ORDER BY id"
    ).fetchall()


def _events(connection: sqlite3.Connection, after: int, upto: int, limit: int) -> Iterator[Event]:
    for number, at, type_, source, tenant, deployment, encoded in connection.execute(
        "SELECT * FROM events WHERE id > ? AND id <= ? ORDER BY id LIMIT ?", (after, upto, limit)
    ):
        yield Event(number, type_, source, at, tenant, deployment, encoded)


def read_stretch(
    connection: sqlite3.Connection, after: int, newest: int, limit: int, wanted: Filter
) -> Stretch:
    """Return the next stretch after an id, up to the id `newest`, with at most `limit` events."""
    found: list[Event] = []
    start, end, looked = after, after, 0
    # one transaction for both reads: an event deleted in between would be missed or reported twice
    connection.execute("BEGIN")
    try:
        lost = _loss(connection, after, wanted)
        for looked, event in enumerate(_events(connection, after, newest, SCAN), 1):
            start = event.id - 1 if looked == 1 else start
            end = event.id
            if wanted.matches(event):
                found.append(event)
                if len(found) == limit:
                    break
    finally:
        connection.execute("COMMIT")
    if looked < SCAN and len(found) < limit:  # the end was reached
        end = max(end, newest)
        start = start if looked else end
    return Stretch(start, end, found, lost)


def _loss(connection: sqlite3.Connection, after: int, wanted: Filter) -> int:
    keys = concerned(wanted)
    whose, given = (
        ("", ()) if keys is None else ("AND key IN (SELECT value FROM json_each(?))", (_listed(keys),))
    )
    (number,) = connection.execute(
        f"SELECT coalesce(max(number), 0) FROM losses WHERE upto > ? {whose}",  # noqa: S608 - ours alone
        (after, *given),
    ).fetchone()
    found: int = number
    return found


# events also kept in memory, for subscribers that are up to date
_RECENT, _RECENT_BYTES = 4096, 8 * _MiB
# events per commit
_GROUP: Final = 1024
# seconds that an event waits for others to share its commit, and least seconds between two commits: a commit
# every 5 ms slows down the tool calls that the events are about by a fifth (measured)
_GATHER, _SPACING = 0.01, 0.05
# events of which a tenant's agent causes hundreds a second, and least seconds between commits of only these
# while nobody follows but the gateway itself: a commit costs as much as some forty of them
_FREQUENT: Final = frozenset({"tool.started", "tool.finished"})
_UNFOLLOWED: Final = 0.2
WAITING: Final = 50_000  # events in memory while they cannot be written: some minutes of a busy gateway's
_RETRY: Final = 1.0
# seconds between two searches for expired events
_AGEING: Final = 600.0
# increment of ids after a power failure, which may undo the last commits and with them ids that clients have
# seen; far more than can be lost
_JUMP: Final = 1_000_000
_TURN: Final = 500  # events counted at once
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class StoredJournal:
    """A journal in the gateway's store, with its latest events also in memory. An async context manager.

    It keeps the last `kept` events with at most `kept_bytes` of JSON, shared by the tenants, and none older
    than `age` seconds except the newest, whose id tells the next process where to continue. While the store
    cannot be written, up to `WAITING` events with at most `kept_bytes` wait in memory and cannot be read.
    Beyond that, the tenant with the most of them loses its oldest, and its subscribers get a gap. Meanwhile
    `failed` has the error, and the journal retries every second.
    """

    def __init__(self, store: Store, *, kept: int, kept_bytes: int, age: float) -> None:
        self._store = store
        self._age = age
        self._last = self._newest = 0  # the last id assigned, and the last one readable
        self._first: int | None = None  # id of the oldest event, until all are in `_shares`
        self._shares, self._losses = Shares(kept, kept_bytes), Losses()
        self._loaded = False
        self._recent = Latest(1)
        self._waiting: dict[int, Event] = {}  # oldest first
        self._room = Shares(WAITING, kept_bytes)
        self._dropped: dict[str, int] = {}  # losses among waiting events, not stored yet
        self._writing = False
        self._appended = asyncio.Event()
        self._grown: Callable[[], None] = lambda: None
        self._followed: Callable[[], bool] = lambda: True
        self._hurried = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._closed = False
        self.failed: StoreFailed | None = None

    async def __aenter__(self) -> StoredJournal:
        """Continue where the last process ended. Raises `StoreFailed`."""
        boot = _BOOT.read_text().strip()
        noted = await self._store.read(noted_boot)
        whole = noted in (None, boot)  # else a power cut may have undone the last commits
        if noted != boot:
            await self._store.write(lambda connection: begin_process(connection, boot, clock()), durable=True)
        self._first, last, losses = await self._store.read(read_ends)
        for key, upto, number in losses:
            self._losses.put(key, upto, number)
        self._last = self._newest = max(upto for _, upto, _ in losses) if last is None else last
        if not whole:
            self._last += _JUMP
            self._dropped[ALL] = self._last
        self._recent = Latest(self._last + 1)
        self._appended.set()  # remove expired events at once
        self._writer = asyncio.create_task(self._write(), name="journal")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Try once to write the waiting events; if that fails, log how many are lost."""
        await self.close()

    async def close(self, *, handing_over: bool = False) -> None:
        """Do as leaving the context does. Events that come later are lost. Idempotent.

        A hand-over to another process waits for no flush of the disk; that process notices a power cut.
        """
        if self._closed:
            return
        self._closed = True
        assert self._writer is not None
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        try:
            while self._waiting:
                await self._flush()
            if not handing_over:
                await self._store.write(end_process, durable=True)
        except StoreFailed as failed:
            log.error("lost %d events: %s", len(self._waiting), failed.message)

    @property
    def oldest(self) -> int:
        oldest = self._shares.oldest if self._loaded else self._first
        return self._newest + 1 if oldest is None else oldest

    @property
    def newest(self) -> int:
        return self._newest

    @property
    def last(self) -> int:
        return self._last

    @property
    def losses(self) -> int:
        return self._losses.number

    @property
    def settled(self) -> bool:
        return self.failed is not None or not (self._waiting or self._writing)

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        events = [numbered(draft, self._last + n) for n, draft in enumerate(drafts, 1)]
        if events:
            self._last = events[-1].id
            self._wait(events)
            self._appended.set()
            if not all(event.type in _FREQUENT for event in events):
                self._hurried.set()
        return events

    async def read(self, after: int, limit: int, wanted: Filter = EVERYTHING) -> Stretch:
        if after + 1 >= self._recent.first:
            return self._recent.read(after, limit, wanted, self._losses.after(after, wanted))
        newest = self.newest
        return await self._store.read(
            lambda connection: read_stretch(connection, after, newest, limit, wanted)
        )

    def watch(self, grown: Callable[[], None], followed: Callable[[], bool]) -> None:
        self._grown, self._followed = grown, followed

    def hurry(self) -> None:
        self._hurried.set()

    def _wait(self, events: Iterable[Event]) -> None:
        """Queue events for writing, and drop those above the limits."""
        for event in events:
            self._waiting[event.id] = event
            self._room.add(event.tenant or NOBODYS, entry_of(event))
        if not self._room.full:
            return
        gone = self._room.excess(-1, 0.0)
        for _, entry in gone:
            del self._waiting[entry.id]
        self._let_go(losses_of(gone))

    def _let_go(self, lost: Mapping[str, int]) -> None:
        for key, upto in lost.items():
            self._dropped[key] = max(upto, self._dropped.get(key, -1))

    def _remember(self, events: Iterable[Event]) -> None:
        for event in events:
            self._recent.add(event)
        self._recent.trim(_RECENT, _RECENT_BYTES)

    async def _write(self) -> None:
        flushed = -math.inf
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._age, _AGEING)):
                    await self._appended.wait()
            await self._gather(flushed)
            flushed = time.monotonic()
            try:
                await self._flush()
            except StoreFailed as failed:
                if self.failed is None:
                    log.error("cannot write events: %s", failed.message)
                self.failed = failed
                self._grown()
                await asyncio.sleep(_RETRY)
                self._appended.set()  # retry even if there is no further event
            except Exception:  # otherwise no event would be delivered any more
                log.exception("cannot write events")
                await asyncio.sleep(_RETRY)
                self._appended.set()
            else:
                if self.failed is not None:
                    log.warning("events can be written again")
                self.failed = None

    async def _gather(self, flushed: float) -> None:
        """Let events wait for others to share their commit; `flushed` is when the last one began."""
        await asyncio.sleep(max(_GATHER, flushed + _SPACING - time.monotonic()))
        if not self._followed():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(flushed + _UNFOLLOWED - time.monotonic()):
                    await self._hurried.wait()

    async def _flush(self) -> None:
        """Write the waiting events, and remove those above the limits or expired. Raises `StoreFailed`.

        Events arriving meanwhile are left for the next time, or under steady load this would never end.
        """
        self._appended.clear()
        self._hurried.clear()
        await self._load()
        full = True
        while full:
            events = list(islice(self._waiting.values(), _GROUP))
            full = len(events) == _GROUP
            await self._keep(events)

    async def _load(self) -> None:
        """Count the events of earlier processes, in turns with other work: there may be many thousands."""
        if self._loaded:
            return
        rows = await self._store.read(read_kept)
        for number, (id_, tenant, deployment, size, at) in enumerate(rows[len(self._shares) :], 1):
            self._shares.add(tenant or NOBODYS, JournalEntry(id_, size, at, deployment))
            if not number % _TURN:
                await asyncio.sleep(0)
        self._loaded = True

    async def _keep(self, events: Sequence[Event]) -> None:
        """Write events and remove those then above the limits, in one transaction."""
        coming = [(event.tenant or NOBODYS, entry_of(event)) for event in events]
        for tenant, entry in coming:
            self._shares.add(tenant, entry)
        newest = events[-1].id if events else self._newest
        gone = self._shares.excess(newest, time.time() - self._age)
        dropped, self._dropped = self._dropped, {}
        lost = dropped | {key: max(upto, dropped.get(key, -1)) for key, upto in losses_of(gone).items()}
        change = Change(events, [entry.id for _, entry in gone], lost)
        if not (events or change.lost):
            return
        change.number = self._losses.number + 1
        change.folded = self._losses.folded()
        for tenant, entry in coming:
            self._room.take(tenant)
            del self._waiting[entry.id]
        self._writing = True
        try:
            await self._store.write(change.write)
        except BaseException:
            self._shares.restore(gone)
            for tenant, _ in reversed(coming):
                self._shares.retract(tenant)
            self._room.restore(coming)
            self._waiting = {**{event.id: event for event in events}, **self._waiting}
            self._let_go(dropped)
            self._wait(())
            raise
        finally:
            self._writing = False
        for key, upto, number in change.losses():
            self._losses.put(key, upto, number)
        self._losses.forget(change.folded[0])
        self._newest = newest
        self._remember(events)
        self._recent.remove(change.removed)
        self._grown()
