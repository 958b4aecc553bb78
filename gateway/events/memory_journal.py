"""Events in memory: the latest ones of a journal, and a journal without a disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from gateway.events.event import EVERYTHING, Draft, Event, Filter, numbered
from gateway.events.journal import SCAN, Stretch
from gateway.events.retention import ALL, NOBODYS, Losses, Shares, entry_of, losses_of

MiB = 1 << 20


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

    def __init__(self, kept: int, kept_bytes: int = 64 * MiB, first: int | None = None) -> None:
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
