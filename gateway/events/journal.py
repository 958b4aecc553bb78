"""Knows how events are kept: the interface of a journal, one in the store, and one that lives in memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from gateway.events.event import EVERYTHING, Draft, Event, Filter, numbered
from gateway.store import Store, StoreFailed

log = logging.getLogger(__name__)

MiB = 1 << 20

# events that one read looks at: bounds how long it holds up others where few of them are wanted
_SCAN: Final = 512
# what is kept in memory of a journal on disk, for whoever keeps up
_RECENT, _RECENT_BYTES = 4096, 8 * MiB
# events of one commit
_GROUP: Final = 1024
# events of one statement; SQLite keeps the parsed statements of each length
_ROWS: Final = 64
# seconds that events wait for others to share their commit, and that lie between two commits: each more often
# would slow down the very tool calls that they tell of, by a fifth every 5 ms (measured)
_GATHER, _SPACING = 0.01, 0.05
_RETRY: Final = 1.0
# seconds between two looks for what is too old
_AGEING: Final = 600.0
# a power cut may take back the last commits, and with them ids that were seen: far beyond what can be lost
_JUMP: Final = 1_000_000
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a read found: the wanted events with ids in `start < id <= end`, all of them.

    What lies between the id after which was asked and `start` is gone.
    """

    start: int
    end: int
    events: Sequence[Event]


class Journal(Protocol):
    """Events in the order of their ids. Used from the event loop only.

    A journal on disk gives ids at once and makes the events readable when they are written: what a
    subscriber has seen is then never lost by a crash. `newest` is therefore the last readable id.
    """

    @property
    def oldest(self) -> int:
        """Id of the oldest readable event; `newest + 1` where there is none."""
        ...

    @property
    def newest(self) -> int:
        """Id of the newest readable event; where there was none yet, the one before the first."""
        ...

    @property
    def last(self) -> int:
        """The id that was given out last, readable or not."""
        ...

    @property
    def settled(self) -> bool:
        """Whether nothing is on its way: what was appended is readable, or cannot be made so now."""
        ...

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Give each draft the next id and keep it. Does not wait; `grown` is called once readable."""
        ...

    async def read(self, after: int, limit: int, wanted: Filter = EVERYTHING) -> Stretch:
        """Return the next stretch after an id, with at most `limit` events; empty where nothing is yet."""
        ...

    def watch(self, grown: Callable[[], None]) -> None:
        """Call `grown` in the loop when `newest` rises or `settled` becomes true. One watcher: the bus."""
        ...


class MemoryJournal:
    """The last `kept` events, and at most `kept_bytes` of their JSON; the oldest go first.

    Ids start at the clock's milliseconds: nothing is remembered across a restart, and yet a new life's
    ids lie above the last one's unless that published more than a thousand events in each second of its
    life. So a client's `Last-Event-ID` of an earlier life is found to be gone, not taken for a later
    event. They stay far below 2**53, what JavaScript counts exactly.
    """

    def __init__(self, kept: int, kept_bytes: int = 64 * MiB, first: int | None = None) -> None:
        first = _clock() if first is None else first
        self._kept, self._kept_bytes = kept, kept_bytes
        self._events: dict[int, Event] = {}  # ids without holes, oldest first
        self._oldest, self._newest = first, first - 1
        self._bytes = 0
        self._grown: Callable[[], None] = lambda: None

    @property
    def oldest(self) -> int:
        return self._oldest

    @property
    def newest(self) -> int:
        return self._newest

    @property
    def last(self) -> int:
        return self._newest

    @property
    def settled(self) -> bool:
        return True

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        # all are encoded before one is kept: a draft that is not JSON leaves no hole in the ids
        events = [numbered(draft, self._newest + n) for n, draft in enumerate(drafts, 1)]
        self.keep(events)
        if events:
            self._grown()
        return events

    def keep(self, events: Sequence[Event]) -> None:
        """Take over events that have their ids; what is before a hole is let go."""
        for event in events:
            if event.id != self._newest + 1:
                self._events.clear()
                self._bytes, self._oldest = 0, event.id
            self._newest = event.id
            self._events[event.id] = event
            self._bytes += len(event.encoded)
            while len(self._events) > self._kept or (self._bytes > self._kept_bytes and self._events):
                self._bytes -= len(self._events.pop(self._oldest).encoded)
                self._oldest += 1

    async def read(self, after: int, limit: int, wanted: Filter = EVERYTHING) -> Stretch:
        return self.look(after, limit, wanted)

    def look(self, after: int, limit: int, wanted: Filter) -> Stretch:
        """Do as `read`, which here never waits."""
        start = end = max(after, self._oldest - 1)
        found: list[Event] = []
        for number in range(start + 1, min(self._newest, start + _SCAN) + 1):
            end, event = number, self._events[number]
            if wanted.matches(event):
                found.append(event)
                if len(found) == limit:
                    break
        return Stretch(start, end, found)

    def watch(self, grown: Callable[[], None]) -> None:
        self._grown = grown


class StoredJournal:
    """Events in the gateway's store, and the latest in memory too. Use as an async context manager.

    Kept are the last `kept` events, at most `kept_bytes` of their JSON, none older than `age` seconds but
    the newest, whose id is the next life's beginning. While the store cannot be written, up to `waiting`
    events wait in memory, unseen by anybody; of more the oldest are dropped, which subscribers are told by
    a gap. `failed` says so meanwhile; each second it is tried again.
    """

    def __init__(self, store: Store, *, kept: int, kept_bytes: int, age: float, waiting: int) -> None:
        self._store = store
        self._kept, self._kept_bytes, self._age, self._room = kept, kept_bytes, age, waiting
        self._last = self._newest = 0  # the ids that were given out and became readable last
        self._held: deque[tuple[int, int, float]] = deque()  # id, bytes and time of what is in the store
        self._bytes = 0
        self._recent = MemoryJournal(_RECENT, _RECENT_BYTES, first=1)
        self._waiting: deque[Event] = deque()
        self._writing = False
        self._appended = asyncio.Event()
        self._grown: Callable[[], None] = lambda: None
        self._writer: asyncio.Task[None] | None = None
        self.failed: StoreFailed | None = None

    async def __aenter__(self) -> StoredJournal:
        """Take up where the last life ended. Raises `StoreFailed`."""
        boot = _BOOT.read_text().strip()
        whole = await self._store.write(lambda connection: _begun(connection, boot), durable=True)
        rows, recent = await self._store.read(_kept)
        self._held.extend(rows)
        self._bytes = sum(row[1] for row in rows)
        self._last = self._newest = rows[-1][0] if rows else _clock()
        self._recent.keep(recent)
        if not whole:
            self._last += _JUMP
        self._appended.set()  # what grew too old meanwhile goes at once
        self._writer = asyncio.create_task(self._write(), name="journal")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what waits, once; say what could not be."""
        assert self._writer is not None
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        try:
            while self._waiting:
                await self._flush()
            await self._store.write(_ended, durable=True)
        except StoreFailed as failed:
            log.error("%d events are lost: %s", len(self._waiting), failed.message)

    @property
    def oldest(self) -> int:
        return self._held[0][0] if self._held else self._newest + 1

    @property
    def newest(self) -> int:
        return self._newest

    @property
    def last(self) -> int:
        return self._last

    @property
    def settled(self) -> bool:
        return self.failed is not None or not (self._waiting or self._writing)

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        events = [numbered(draft, self._last + n) for n, draft in enumerate(drafts, 1)]
        if events:
            self._last = events[-1].id
            self._waiting.extend(events)
            self._trim()
            self._appended.set()
        return events

    async def read(self, after: int, limit: int, wanted: Filter = EVERYTHING) -> Stretch:
        if after + 1 >= max(self._recent.oldest, self.oldest):
            return self._recent.look(after, limit, wanted)
        newest = self.newest
        return await self._store.read(lambda connection: _stretch(connection, after, newest, limit, wanted))

    def watch(self, grown: Callable[[], None]) -> None:
        self._grown = grown

    def _trim(self) -> None:
        while len(self._waiting) > self._room:
            self._waiting.popleft()

    async def _write(self) -> None:
        flushed = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._age, _AGEING)):
                    await self._appended.wait()
            await asyncio.sleep(max(_GATHER, flushed + _SPACING - time.monotonic()))
            flushed = time.monotonic()
            try:
                await self._flush()
            except StoreFailed as failed:
                if self.failed is None:
                    log.error("events cannot be written: %s", failed.message)
                self.failed = failed
                self._grown()
                await asyncio.sleep(_RETRY)
                self._appended.set()  # what waits is tried again, also where nothing more comes
            else:
                if self.failed is not None:
                    log.warning("events can be written again")
                self.failed = None

    async def _flush(self) -> None:
        """Write what waits now, and remove what need not be kept any more. Raises `StoreFailed`.

        What comes meanwhile is for the next time: while calls come one after the other, some always would.
        """
        self._appended.clear()
        full = True
        while full:
            events = list(islice(self._waiting, _GROUP))
            full = len(events) == _GROUP
            coming = [(event.id, len(event.encoded), event.time) for event in events]
            outdated = self._outdated(coming)
            if not events and not outdated:
                return
            for _ in events:
                self._waiting.popleft()
            self._writing = True
            try:
                await self._store.write(lambda connection: _write(connection, events, outdated))  # noqa: B023
            except BaseException:
                self._waiting.extendleft(reversed(events))
                self._trim()
                raise
            finally:
                self._writing = False
            self._held.extend(coming)
            self._bytes += sum(entry[1] for entry in coming)
            while self._held and self._held[0][0] <= outdated:
                self._bytes -= self._held.popleft()[1]
            self._newest = self._held[-1][0]
            self._recent.keep(events)
            self._grown()

    def _outdated(self, coming: Sequence[tuple[int, int, float]]) -> int:
        """Return the id up to which nothing is kept once those have come; 0 for none."""
        count = len(self._held) + len(coming)
        size = self._bytes + sum(entry[1] for entry in coming)
        born = time.time() - self._age
        upto = 0
        for number, length, at in chain(self._held, coming):
            if count == 1 or not (count > self._kept or size > self._kept_bytes or at < born):
                break
            count, size, upto = count - 1, size - length, number
        return upto


def _clock() -> int:
    return time.time_ns() // 1_000_000


# --- statements: each is a work of the store -----------------------------------------------------------


def _begun(connection: sqlite3.Connection, boot: str) -> bool:
    """Note that a life begins; return whether all that the last one wrote must still be there."""
    found = connection.execute("SELECT boot FROM journal").fetchone()
    connection.execute("INSERT OR REPLACE INTO journal VALUES (1, ?)", (boot,))
    return found is None or found[0] in (None, boot)


def _ended(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE journal SET boot = NULL")


def _kept(connection: sqlite3.Connection) -> tuple[list[tuple[int, int, float]], Sequence[Event]]:
    """Return what is kept of every event, and the latest of them."""
    rows = connection.execute("SELECT id, length(encoded), time FROM events ORDER BY id").fetchall()
    if not rows:
        return rows, ()
    after = rows[max(0, len(rows) - _RECENT)][0] - 1
    return rows, list(_events(connection, after, rows[-1][0], _RECENT))


# those of a write whose end was not seen may be there already
_INSERT: Final = "INSERT OR IGNORE INTO events VALUES"


def _write(connection: sqlite3.Connection, events: Sequence[Event], outdated: int) -> None:
    # Many rows in one statement: for each statement the thread lets go of the interpreter and takes it again,
    # in the middle of the very calls that the events tell of.
    for rows in (events[at : at + _ROWS] for at in range(0, len(events), _ROWS)):
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
    if outdated:
        connection.execute("DELETE FROM events WHERE id <= ?", (outdated,))


def _events(connection: sqlite3.Connection, after: int, upto: int, limit: int) -> Iterator[Event]:
    for number, at, type_, source, tenant, deployment, encoded in connection.execute(
        "SELECT * FROM events WHERE id > ? AND id <= ? ORDER BY id LIMIT ?", (after, upto, limit)
    ):
        yield Event(number, type_, source, at, tenant, deployment, encoded)


def _stretch(connection: sqlite3.Connection, after: int, newest: int, limit: int, wanted: Filter) -> Stretch:
    start = end = after
    found: list[Event] = []
    for event in _events(connection, after, newest, _SCAN):
        if event.id != end + 1:
            if end > after:
                break  # the next stretch begins after this hole
            start = event.id - 1
        end = event.id
        if wanted.matches(event):
            found.append(event)
            if len(found) == limit:
                break
    return Stretch(start, end, found)
