"""The event journal in the gateway's store: writes events in groups, and drops the oldest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final

from gateway.events import journal_statements as statements
from gateway.events.event import EVERYTHING, Draft, Event, Filter, numbered
from gateway.events.journal import Stretch
from gateway.events.memory_journal import Latest, clock
from gateway.events.retention import ALL, NOBODYS, Entry, Losses, Shares, entry_of, losses_of
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)

MiB = 1 << 20

# events also kept in memory, for subscribers that are up to date
_RECENT, _RECENT_BYTES = 4096, 8 * MiB
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
        noted = await self._store.read(statements.noted_boot)
        whole = noted in (None, boot)  # else a power cut may have undone the last commits
        if noted != boot:
            await self._store.write(
                lambda connection: statements.begin_process(connection, boot, clock()), durable=True
            )
        self._first, last, losses = await self._store.read(statements.read_ends)
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
                await self._store.write(statements.end_process, durable=True)
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
            lambda connection: statements.read_stretch(connection, after, newest, limit, wanted)
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
        rows = await self._store.read(statements.read_kept)
        for number, (id_, tenant, deployment, size, at) in enumerate(rows[len(self._shares) :], 1):
            self._shares.add(tenant or NOBODYS, Entry(id_, size, at, deployment))
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
        change = statements.Change(events, [entry.id for _, entry in gone], lost)
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
