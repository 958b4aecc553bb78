"""Publishes events to the journal, and follows it for subscribers."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from gateway.events.event import Draft, Event, Filter, Span, gap
from gateway.events.journal import Journal

# events that a subscription reads at once: bounds what one slow subscriber holds
BATCH: Final = 64

Spans = Callable[[Iterable[str]], Mapping[str, Span]]


class Bus:
    """The gateway's events, from publishers to subscribers. Used from the event loop only.

    There are no queues. A subscription is a place in the journal, so a slow one costs no memory and
    loses nothing that the journal keeps; what it does not keep any more becomes a `gap`.
    """

    def __init__(self, journal: Journal, name: str = "gateway") -> None:
        self._journal = journal
        self._source = f"/gateway/{name}"
        self._grown = asyncio.Event()
        self._closed = False
        self._spans: Spans | None = lambda names: {}
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        journal.watch(self._wake)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def newest(self) -> int:
        """Id of the newest event that subscribers can have seen."""
        return self._journal.newest

    @property
    def last(self) -> int:
        """Id of the newest event, readable or not."""
        return self._journal.last

    @property
    def subscribers(self) -> int:
        """How many subscriptions are open: for metrics."""
        return len(self._subscriptions)

    def publish(
        self,
        type: str,
        tenant: str | None = None,
        data: Mapping[str, Any] | None = None,
        deployment: str | None = None,
    ) -> Event:
        """Record an event and wake the subscribers. Never waits.

        `data` must be JSON values, else `TypeError`, without secrets, file contents or host paths.
        After `close` events are still recorded.
        """
        body = dict(data or {})
        if deployment is not None:
            body.setdefault("deployment", deployment)
        draft = Draft(type, self._source, time.time(), tenant, deployment, body)
        return self._journal.append([draft])[0]

    def subscribe(self, filter: Filter, after: int | None = None) -> Subscription:
        """Follow the events that `filter` lets through: from now on, or all after the id `after`.

        The place in the journal is taken now, not when iteration starts: subscribe first, read the
        state after, and no change falls between. If `after` is older than what is kept, or in the future
        because another process gave it out, a `gap` comes first and then all that is kept.

        A subscriber that covers names, not all tenants, gets nothing of earlier tenants of these names; see
        `part`.
        """
        subscription = Subscription(self, self._journal, filter, after)
        self._subscriptions.add(subscription)
        return subscription

    def part(self, spans: Spans | None) -> None:
        """Set the function that says where the events of the present tenants of names begin.

        While it returns None, for not known, a subscriber that covers names and asks for earlier events
        waits.
        """
        self._spans = spans
        self._wake()

    def close(self) -> None:
        """End every subscription once it has delivered what is recorded by now. Idempotent.

        What cannot be recorded is not waited for.
        """
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        # waiting readers hold this object and wake; the next reader waits on the new one
        self._grown.set()
        self._grown = asyncio.Event()


class Subscription:
    """One subscriber's place in the journal, and the events from there on as an async iterator.

    `last_id` is the id up to which all matching events were handed out: the `Last-Event-ID` that
    resumes here, further along than the last event where the ones after it did not match. Iteration
    ends after `close`, its own or the bus's.
    """

    def __init__(self, bus: Bus, journal: Journal, filter: Filter, after: int | None) -> None:
        self._bus, self._journal, self._filter = bus, journal, filter
        self._ready: deque[Event] = deque()  # at most BATCH, and a gap
        self._closed = self._waiting = False
        self._cursor = journal.last if after is None else after
        self._told = 0  # the latest loss of which a gap told
        self._hidden = -1  # last id of an earlier tenant's events, hidden from the present one of its name
        # events from now on are for every subscriber that may see that name now
        self._parted = after is None or filter.coverage is None

    @property
    def last_id(self) -> int:
        if self._ready:
            return self._ready[0].id - 1
        # an id that is not written yet may be another event's in the next process
        return min(self._cursor, self._journal.newest)

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        if self._ready or await self._fill():
            return self._ready.popleft()
        raise StopAsyncIteration

    async def batch(self) -> Sequence[Event]:
        """Return the next events, at most some dozens, as soon as there is one; none after the end."""
        if not self._ready and not await self._fill():
            return ()
        events = tuple(self._ready)
        self._ready.clear()
        return events

    async def _fill(self) -> bool:
        """Have something ready; return False where iteration ends instead."""
        journal, source = self._journal, self._bus._source
        while not self._closed:
            grown, closing, before = self._bus._grown, self._bus.closed, self._cursor
            if not self._parted:
                if (spans := self._bus._spans) is not None:
                    self._filter = replace(self._filter, names=spans(self._filter.coverage or ()))
                    self._hidden = self._filter.hidden()
                    self._parted = True
                elif closing:
                    break
                else:
                    await self._wait(grown)
                    continue
            if before > journal.last:
                self._cursor, self._told, self._hidden = journal.oldest - 1, journal.losses, -1
                self._ready.append(gap(journal.oldest, source, time.time()))
                return True
            stretch = await journal.read(before, BATCH, self._filter)
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
                # reading from memory never waits: let others run while we skip a long stretch
                await asyncio.sleep(0)
            elif closing and journal.settled and journal.newest <= before:
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

    def close(self) -> None:
        """End the iteration, also for a task that waits in it. Idempotent."""
        self._closed = True
        self._ready.clear()
        self._bus._subscriptions.discard(self)
        if self._waiting:
            self._bus._wake()
