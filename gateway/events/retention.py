"""Retention of events: each tenant's share of the journal, and up to which id it has lost events."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from gateway.events.event import Event, Filter

# most tenants and deployments whose losses are tracked separately
_LOSSES: Final = 10_000


class Entry(NamedTuple):
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
        self._of: dict[str, deque[Entry]] = {}
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

    def add(self, tenant: str, entry: Entry) -> None:
        self._of.setdefault(tenant, deque()).append(entry)
        self._count_in(tenant, entry)

    def excess(self, newest: int, born: float) -> list[tuple[str, Entry]]:
        """Remove and return events above the limits or older than `born`, but never the newest."""
        gone: list[tuple[str, Entry]] = []
        for tenant in [tenant for tenant, entries in self._of.items() if entries[0].time < born]:
            while (entries := self._of.get(tenant)) and entries[0].time < born and entries[0].id != newest:
                gone.append((tenant, self.take(tenant)))
        gone += self._lighten(newest, lambda tenant: len(self._of[tenant]), lambda: self._count > self._most)
        gone += self._lighten(newest, self._bytes_of.__getitem__, lambda: self._bytes > self._most_bytes)
        return gone

    def take(self, tenant: str) -> Entry:
        """Remove and return the tenant's oldest event."""
        entry = self._of[tenant].popleft()
        self._count_out(tenant, entry)
        return entry

    def restore(self, gone: Sequence[tuple[str, Entry]]) -> None:
        """Put back what `excess` removed."""
        for tenant, entry in reversed(gone):
            self._of.setdefault(tenant, deque()).appendleft(entry)
            self._count_in(tenant, entry)

    def retract(self, tenant: str) -> None:
        """Remove the tenant's latest event."""
        self._count_out(tenant, self._of[tenant].pop())

    def _lighten(
        self, newest: int, weight: Callable[[str], int], too_much: Callable[[], bool]
    ) -> Iterator[tuple[str, Entry]]:
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

    def _count_in(self, tenant: str, entry: Entry) -> None:
        self._count += 1
        self._bytes += entry.size
        self._bytes_of[tenant] = self._bytes_of.get(tenant, 0) + entry.size

    def _count_out(self, tenant: str, entry: Entry) -> None:
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


def losses_of(gone: Iterable[tuple[str, Entry]]) -> dict[str, int]:
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


def entry_of(event: Event) -> Entry:
    return Entry(event.id, len(event.encoded), event.time, event.deployment)
