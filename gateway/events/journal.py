"""Stores events: the interface of a journal, one in SQLite, one in memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

import orjson

from gateway.events.event import EVERYTHING, Draft, Event, Filter, numbered
from gateway.events.retention import ALL, NOBODYS, Entry, Losses, Shares, concerned, entry_of, losses_of
from gateway.storage.store import Store, StoreFailed

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
    """What a read found: the wanted events with ids in `start < id <= end` that are kept.

    Nothing is kept of what lies between the id after which was asked and `start`. `lost` is not 0 where an
    event after that id is no longer kept which may have been a wanted one: the number of the loss that was
    the latest.
    """

    start: int
    end: int
    events: Sequence[Event]
    lost: int = 0


class Journal(Protocol):
    """Events in the order of their ids. Used from the event loop only.

    A journal on disk gives ids at once and makes the events readable when they are written: what a
    subscriber has seen is then never lost by a crash. `newest` is therefore the last readable id.

    Its room is shared by the tenants: where there is too much, whoever has most loses its oldest.
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
    def losses(self) -> int:
        """How often something was let go of; grows across restarts too."""
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


class _Latest:
    """The latest events, in memory: all that are kept from `first` on. Ids may have holes."""

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
        """Forget the oldest, until there are not too many."""
        while len(self.events) > most or self._bytes > most_bytes:
            oldest = next(iter(self.events))
            self.remove([oldest])
            self.first = oldest + 1

    def look(self, after: int, limit: int, wanted: Filter, lost: int) -> Stretch:
        oldest = next(iter(self.events), self.newest + 1)
        start = end = max(after, oldest - 1)
        found: list[Event] = []
        for number in range(start + 1, min(self.newest, start + _SCAN) + 1):
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
    """The last `kept` events, and at most `kept_bytes` of their JSON, shared by the tenants.

    Ids start at the clock's milliseconds: nothing is remembered across a restart, and yet a new life's
    ids lie above the last one's unless that published more than a thousand events in each second of its
    life. So a client's `Last-Event-ID` of an earlier life is found to be gone, not taken for a later
    event. They stay far below 2**53, what JavaScript counts exactly.
    """

    def __init__(self, kept: int, kept_bytes: int = 64 * MiB, first: int | None = None) -> None:
        self._latest = _Latest(_clock() if first is None else first)
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
        # all are encoded before one is kept: a draft that is not JSON leaves no hole in the ids
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
        return self._latest.look(after, limit, wanted, self._losses.after(after, wanted))

    def watch(self, grown: Callable[[], None]) -> None:
        self._grown = grown


class StoredJournal:
    """Events in the gateway's store, and the latest in memory too. Use as an async context manager.

    Kept are the last `kept` events, at most `kept_bytes` of their JSON, shared by the tenants; none older
    than `age` seconds but the newest, whose id is the next life's beginning. While the store cannot be
    written, up to `waiting` events, of as many bytes, wait in memory, unseen by anybody; of more the oldest
    of whoever has most are dropped, which subscribers are told by a gap. `failed` says so meanwhile; each
    second it is tried again.
    """

    def __init__(self, store: Store, *, kept: int, kept_bytes: int, age: float, waiting: int) -> None:
        self._store = store
        self._age = age
        self._last = self._newest = 0  # the ids that were given out and became readable last
        self._shares, self._losses = Shares(kept, kept_bytes), Losses()
        self._recent = _Latest(1)
        self._waiting: dict[int, Event] = {}  # oldest first
        self._room = Shares(waiting, kept_bytes)
        self._dropped: dict[str, int] = {}  # what was lost of those that waited, and is not on record yet
        self._writing = False
        self._appended = asyncio.Event()
        self._grown: Callable[[], None] = lambda: None
        self._writer: asyncio.Task[None] | None = None
        self.failed: StoreFailed | None = None

    async def __aenter__(self) -> StoredJournal:
        """Take up where the last life ended. Raises `StoreFailed`."""
        boot = _BOOT.read_text().strip()
        whole = await self._store.write(lambda connection: _begun(connection, boot, _clock()), durable=True)
        rows, recent, losses = await self._store.read(_kept)
        for id_, tenant, deployment, size, at in rows:
            self._shares.add(tenant or NOBODYS, Entry(id_, size, at, deployment))
        for key, upto, number in losses:
            self._losses.put(key, upto, number)
        self._last = self._newest = rows[-1][0] if rows else max(upto for _, upto, _ in losses)
        if whole:
            self._recent = _Latest(recent[0].id if recent else self._newest + 1)
            self._remember(recent)
        else:
            self._last += _JUMP
            self._recent = _Latest(self._last + 1)
            self._dropped[ALL] = self._last
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
        oldest = self._shares.oldest
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
        return events

    async def read(self, after: int, limit: int, wanted: Filter = EVERYTHING) -> Stretch:
        if after + 1 >= self._recent.first:
            return self._recent.look(after, limit, wanted, self._losses.after(after, wanted))
        newest = self.newest
        return await self._store.read(lambda connection: _stretch(connection, after, newest, limit, wanted))

    def watch(self, grown: Callable[[], None]) -> None:
        self._grown = grown

    def _wait(self, events: Iterable[Event]) -> None:
        """Have events wait to be written, and let go of what is too much of them."""
        for event in events:
            self._waiting[event.id] = event
            self._room.add(event.tenant or NOBODYS, entry_of(event))
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
            except Exception:  # else nobody would see an event any more
                log.exception("events cannot be written")
                await asyncio.sleep(_RETRY)
                self._appended.set()
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
            events = list(islice(self._waiting.values(), _GROUP))
            full = len(events) == _GROUP
            await self._keep(events)

    async def _keep(self, events: Sequence[Event]) -> None:
        """Write events, and remove what is too much with them."""
        coming = [(event.tenant or NOBODYS, entry_of(event)) for event in events]
        for tenant, entry in coming:
            self._shares.add(tenant, entry)
        newest = events[-1].id if events else self._newest
        gone = self._shares.excess(newest, time.time() - self._age)
        dropped, self._dropped = self._dropped, {}
        lost = dropped | {key: max(upto, dropped.get(key, -1)) for key, upto in losses_of(gone).items()}
        change = _Change(events, [entry.id for _, entry in gone], lost)
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


@dataclass(slots=True)
class _Change:
    """What one transaction does to the journal: `events` come, the ids `removed` go as the loss `number`.

    `lost` says of whom up to which id; `folded` of whom it is no longer known apart.
    """

    events: Sequence[Event]
    removed: Sequence[int]
    lost: Mapping[str, int]
    number: int = 0
    folded: tuple[Sequence[str], int] = ((), 0)

    def losses(self) -> list[tuple[str, int, int]]:
        found = dict(self.lost)
        if self.folded[0]:
            found[ALL] = max(self.folded[1], found.get(ALL, -1))
        return [(key, upto, self.number) for key, upto in found.items()]

    def write(self, connection: sqlite3.Connection) -> None:
        # Many rows in one statement: for each statement the thread lets go of the interpreter and takes it
        # again, in the middle of the very calls that the events tell of.
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


def _clock() -> int:
    return time.time_ns() // 1_000_000


# --- statements: each is a work of the store -----------------------------------------------------------

# those of a write whose end was not seen may be there already
_INSERT: Final = "INSERT OR IGNORE INTO events VALUES"
_LOSE: Final = (
    "INSERT INTO losses VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
    " upto = max(upto, excluded.upto), number = excluded.number"
)
_REMOVE: Final = "DELETE FROM events WHERE id IN (SELECT value FROM json_each(?))"
_FOLD: Final = "DELETE FROM losses WHERE key IN (SELECT value FROM json_each(?))"


def _listed(values: Iterable[int | str]) -> str:
    return orjson.dumps(list(values)).decode()


def _begun(connection: sqlite3.Connection, boot: str, clock: int) -> bool:
    """Note that a life begins; return whether all that the last one wrote must still be there."""
    found = connection.execute("SELECT boot FROM journal").fetchone()
    connection.execute("INSERT OR REPLACE INTO journal VALUES (1, ?)", (boot,))
    connection.execute(
        "INSERT OR IGNORE INTO losses VALUES (?, coalesce((SELECT min(id) - 1 FROM events), ?), 1)",
        (ALL, clock),
    )
    return found is None or found[0] in (None, boot)


def _ended(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE journal SET boot = NULL")


# id, tenant, deployment, bytes, time
_Row = tuple[int, str | None, str | None, int, float]


def _kept(
    connection: sqlite3.Connection,
) -> tuple[list[_Row], Sequence[Event], list[tuple[str, int, int]]]:
    """Return what is kept of every event, the latest of them, and what is lost."""
    losses = connection.execute("SELECT key, upto, number FROM losses").fetchall()
    rows = connection.execute(
        "SELECT id, tenant, deployment, length(encoded), time FROM events ORDER BY id"
    ).fetchall()
    if not rows:
        return rows, (), losses
    after = rows[max(0, len(rows) - _RECENT)][0] - 1
    return rows, list(_events(connection, after, rows[-1][0], _RECENT)), losses


def _events(connection: sqlite3.Connection, after: int, upto: int, limit: int) -> Iterator[Event]:
    for number, at, type_, source, tenant, deployment, encoded in connection.execute(
        "SELECT * FROM events WHERE id > ? AND id <= ? ORDER BY id LIMIT ?", (after, upto, limit)
    ):
        yield Event(number, type_, source, at, tenant, deployment, encoded)


def _stretch(connection: sqlite3.Connection, after: int, newest: int, limit: int, wanted: Filter) -> Stretch:
    found: list[Event] = []
    start, end, looked = after, after, 0
    connection.execute(
        "BEGIN"
    )  # one state of both: what goes between two looks would be missed or told twice
    try:
        lost = _loss(connection, after, wanted)
        for looked, event in enumerate(_events(connection, after, newest, _SCAN), 1):
            start = event.id - 1 if looked == 1 else start
            end = event.id
            if wanted.matches(event):
                found.append(event)
                if len(found) == limit:
                    break
    finally:
        connection.execute("COMMIT")
    if looked < _SCAN and len(found) < limit:  # nothing more is kept
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
