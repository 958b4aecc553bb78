"""Knows how events are kept: the interface of a journal, and one that lives in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.events.event import Draft, Event, numbered

MiB = 1 << 20


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

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Give each draft the next id and keep it. Does not wait; `grown` is called once readable."""
        ...

    async def read(self, after: int, limit: int) -> list[Event]:
        """Return at most `limit` events with ids above `after`, in order, without a hole.

        A hole can only be in front: where the first id is not `after + 1`, the ones between are gone.
        """
        ...

    def watch(self, grown: Callable[[], None]) -> None:
        """Call `grown` in the loop whenever `newest` rises. One watcher: the bus."""
        ...


class MemoryJournal:
    """The last `kept` events, and at most `kept_bytes` of their JSON; the oldest go first.

    Ids start at the clock's milliseconds: nothing is remembered across a restart, and yet a new life's
    ids lie above the last one's unless that published more than a thousand events in each second of its
    life. So a client's `Last-Event-ID` of an earlier life is found to be gone, not taken for a later
    event. They stay far below 2**53, what JavaScript counts exactly.
    """

    def __init__(self, kept: int, kept_bytes: int = 64 * MiB, first: int | None = None) -> None:
        first = time.time_ns() // 1_000_000 if first is None else first
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

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        # all are encoded before one is kept: a draft that is not JSON leaves no hole in the ids
        events = [numbered(draft, self._newest + n) for n, draft in enumerate(drafts, 1)]
        for event in events:
            self._newest = event.id
            self._events[event.id] = event
            self._bytes += len(event.encoded)
            while len(self._events) > self._kept or (self._bytes > self._kept_bytes and self._events):
                self._bytes -= len(self._events.pop(self._oldest).encoded)
                self._oldest += 1
        if events:
            self._grown()
        return events

    async def read(self, after: int, limit: int) -> list[Event]:
        first = max(after + 1, self._oldest)
        return [self._events[number] for number in range(first, min(self._newest, first + limit - 1) + 1)]

    def watch(self, grown: Callable[[], None]) -> None:
        self._grown = grown
