"""Publish events to the journal, and follow it for subscribers."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from gateway.errors import Unavailable
from gateway.events.event import Draft, Event, Filter, Span, gap, source
from gateway.events.journal import Journal

# events a subscription reads at once, which bounds the memory of a slow subscriber
BATCH: Final = 64

Spans = Callable[[Iterable[str]], Mapping[str, Span]]


class Bus:
    """The gateway's events, from publishers to subscribers. Use it from the event loop only.

    There are no queues. A subscription is a position in the journal, so a slow one costs no memory and loses
    nothing that the journal keeps; events that are no longer kept become a `gap`.
    """

    def __init__(self, journal: Journal, member: str = "") -> None:
        """`member` is the gateway's own, empty without a cluster."""
        self.member = member
        self._journal = journal
        self._source = source(member)
        self._grown = asyncio.Event()
        self._closed = False
        self._spans: Spans | None = lambda names: {}
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        journal.watch(self._wake, self._followed)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def newest(self) -> int:
        """Id of the newest event that subscribers may have seen."""
        return self._journal.newest

    @property
    def last(self) -> int:
        """Id of the newest event, readable or not."""
        return self._journal.last

    @property
    def subscribers(self) -> int:
        """Number of open subscriptions."""
        return len(self._subscriptions)

    def publish(
        self,
        type: str,
        tenant: str | None = None,
        data: Mapping[str, Any] | None = None,
        deployment: str | None = None,
    ) -> Event:
        """Record an event and wake the subscribers. Never waits.

        `data` must be JSON, without secrets, file contents or host paths. Events are recorded even after
        `close`. Raises `TypeError` if `data` is not JSON.
        """
        body = dict(data or {})
        if deployment is not None:
            body.setdefault("deployment", deployment)
        draft = Draft(type, self._source, time.time(), tenant, deployment, body)
        return self._journal.append([draft])[0]

    async def recorded(self, event: Event) -> None:
        """Wait until no crash can lose an event, or until it cannot be recorded for now."""
        while self.newest < event.id and not self._journal.settled:
            await self._grown.wait()

    async def latest(self, many: int, type: str) -> Sequence[Event]:
        """Return those of a type among the latest events that are on record."""
        found: list[Event] = []
        newest = self._journal.newest
        at = newest - many
        while at < newest:  # a read examines some hundreds
            stretch = await self._journal.read(at, many, Filter(types=(type,)))
            found += stretch.events
            at = stretch.end
        return found

    def _followed(self) -> bool:
        return any(not subscription.patient for subscription in self._subscriptions)

    def subscribe(self, filter: Filter, after: int | None = None, *, patient: bool = False) -> Subscription:
        """Follow the events that match `filter`: from now on, or all after the id `after`.

        The position is fixed now, not when iteration starts: subscribe first, then read the state, and no
        change is missed. If `after` is older than the kept events, or in the future because another process
        issued it, a `gap` comes first, followed by everything kept.

        A subscriber limited to some names gets no events of earlier tenants with these names; see `part`.
        While all are `patient`, as the gateway's own are, events of tool calls may come a little later.
        """
        subscription = Subscription(self, self._journal, filter, after, patient=patient)
        self._subscriptions.add(subscription)
        if not patient:
            self._journal.hurry()
        return subscription

    def part(self, spans: Spans | None) -> None:
        """Set the function that returns where the events of the current tenants with given names begin.

        While `spans` is None, meaning unknown, a subscriber limited to names that wants earlier events has to
        wait.
        """
        self._spans = spans
        self._wake()

    def close(self) -> None:
        """End every subscription once it has delivered everything recorded so far. Idempotent.

        Events that cannot be recorded are not waited for.
        """
        self._closed = True
        self._journal.hurry()
        self._wake()

    def _wake(self) -> None:
        # waiting readers hold the old event and wake up; later ones wait on the new one
        self._grown.set()
        self._grown = asyncio.Event()


class Subscription:
    """A subscriber's position in the journal; an async iterator of the events after it.

    `last_id` is the id up to which all matching events have been returned: the `Last-Event-ID` to resume
    here. It is higher than the last event's id if later events did not match. Iteration ends after `finish`
    or `close` of the subscription, or `close` of the bus.
    """

    def __init__(
        self, bus: Bus, journal: Journal, filter: Filter, after: int | None, *, patient: bool = False
    ) -> None:
        self._bus, self._journal, self._filter, self.patient = bus, journal, filter, patient
        self._ready: deque[Event] = deque()  # at most BATCH, and a gap
        self._closed = self._waiting = False
        self._final: int | None = None  # id of the last event to return
        self._cursor = journal.last if after is None else after
        self._told = 0  # number of the latest loss reported by a gap
        self._hidden = -1  # last id of events that are hidden because they are an earlier tenant's
        # events from now on concern every subscriber that may see the name now
        self._parted = after is None or filter.coverage is None

    @property
    def last_id(self) -> int:
        if self._ready:
            return self._ready[0].id - 1
        # an id that is not written yet may be reused by the next process
        return min(self._cursor, self._journal.newest)

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        if self._ready or await self._fill():
            return self._ready.popleft()
        raise StopAsyncIteration

    async def batch(self) -> Sequence[Event]:
        """Wait for events and return the next ones, at most some dozens; empty at the end."""
        if not self._ready and not await self._fill():
            return ()
        events = tuple(self._ready)
        self._ready.clear()
        return events

    async def _fill(self) -> bool:
        """Wait until events are ready; return False at the end of the iteration."""
        journal, source = self._journal, self._bus._source
        while not self._closed:
            grown, closing, before = self._bus._grown, self._bus.closed, self._cursor
            if not self._parted:
                if (spans := self._bus._spans) is not None:
                    self._filter = replace(self._filter, names=spans(self._filter.coverage or ()))
                    self._hidden = self._filter.hidden()
                    self._parted = True
                elif closing or self._final is not None:
                    break
                else:
                    await self._wait(grown)
                    continue
            if before > journal.last:
                self._cursor, self._told, self._hidden = journal.oldest - 1, journal.losses, -1
                self._ready.append(gap(journal.oldest, source, time.time()))
                return True
            try:
                stretch = await journal.read(before, BATCH, self._filter)
            except Unavailable:
                if not closing:
                    raise
                break  # another process has the records by now, and knows the rest
            if self._closed:
                break
            self._cursor = stretch.end
            if stretch.lost > self._told or self._hidden > before:
                self._told, self._hidden = max(stretch.lost, self._told), -1
                oldest = stretch.events[0].id if stretch.events else stretch.start + 1
                self._ready.append(gap(oldest, source, time.time()))
            self._ready.extend(stretch.events)
            if self._ready:
                return True
            if stretch.end > before:
                # reading from memory never yields to the loop: let others run during a long skip
                await asyncio.sleep(0)
            elif (closing and journal.settled and journal.newest <= before) or (
                self._final is not None and self._final <= before
            ):
                break
            else:
                await self._wait(grown)
        self.close()
        return False

    async def _wait(self, grown: asyncio.Event) -> None:
        self._waiting = True
        try:
            await grown.wait()
        finally:
            self._waiting = False

    def finish(self) -> None:
        """End the iteration once it has returned what was published before. Idempotent."""
        self._final = self._bus.last
        self._journal.hurry()
        if self._waiting:
            self._bus._wake()

    def close(self) -> None:
        """End the iteration, also for a task waiting in it. Idempotent."""
        self._closed = True
        self._ready.clear()
        self._bus._subscriptions.discard(self)
        if self._waiting:
            self._bus._wake()
