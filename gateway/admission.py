"""Admission: counts what owners have in use, and refuses or queues what exceeds a limit.

Everything that is counted goes through it: slots, bytes, sockets, commands, readers of logs, transfers.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Generic, Literal, TypeVar

from gateway.errors import RateLimited

RETRY_AFTER: Final = 1  # seconds

# reservations granted per iteration of the loop: thousands may wait, and each one granted has work to do
_GRANTED: Final = 16


def descriptors() -> int:
    """Return how many files and sockets this process may have open at most."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


Owner = TypeVar("Owner", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Full:
    """What has no room, its limit, and whose limit that is."""

    name: str
    limit: int
    of: Literal["part", "owner", "all"]


class Reservation(Generic[Owner]):
    """What one use has taken until `release`. A context manager."""

    __slots__ = ("_admission", "_owner", "_part", "size")

    def __init__(self, admission: Admission[Owner], owner: Owner, part: Hashable = None) -> None:
        self._admission, self._owner, self._part = admission, owner, part
        self.size = 0

    def hold(self, size: int) -> None:
        """Count what exists already, regardless of limits; a negative size gives some back."""
        self.size += size
        self._admission._count(self._owner, self._part, size)

    def grow(self, size: int) -> None:
        """Take more. Raises `RateLimited`, naming what is full."""
        full = self._admission.full(self._owner, size, self._part)
        if full is not None:
            raise self._admission.refusal(full, size)
        self.hold(size)

    def release(self) -> None:
        """Give all back. Idempotent."""
        if self.size:
            if self._admission._displaceable:
                self._admission._forget(self, self._owner)
            self.hold(-self.size)

    def __enter__(self) -> Reservation[Owner]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(slots=True, eq=False)
class _Waiter(Generic[Owner]):
    owner: Owner
    part: Hashable
    size: int
    granted: asyncio.Future[Reservation[Owner]]
    expiry: asyncio.TimerHandle | None = None


class Admission(Generic[Owner]):
    """Counts one kind of thing, named `what`. Use it from the event loop only.

    An owner has at most `each`, which may depend on the owner, and all have at most `total`; a `part` of an
    owner, such as one of its sockets, has at most `part`. Whoever has nothing may take more than its limit
    once, so that nothing is too large forever.

    `reserve` never waits. `acquire` does: owners take turns, so that one that has many waiting delays another
    by at most one of its turns per slot. An owner at its own limit keeps its turn until it has room. At most
    `waiting` wait, each for at most `patience` seconds; if there are more, the last one of the owner with the
    most is refused. None leaves that bound to the caller.

    `name` is what `each` is a limit of in refusals, and `hint` the next step that they advise.
    """

    def __init__(
        self,
        what: str,
        *,
        each: int | Callable[[Owner], int],
        total: int | None = None,
        part: int | None = None,
        waiting: int | None = None,
        patience: float | None = None,
        name: str = "this tenant",
        hint: str = "try again when some have ended",
        retry_after: float = RETRY_AFTER,
    ) -> None:
        self.what, self.total = what, total
        self._each, self._part, self._most_waiting, self._patience = each, part, waiting, patience
        self._name, self._hint, self._retry_after = name, hint, retry_after
        self.held = 0
        self._owners: dict[Owner, int] = {}  # of those that have something
        self._parts: dict[tuple[Owner, Hashable], int] = {}
        # reservations that another may take over, oldest first
        self._displaceable: dict[Owner, dict[Reservation[Owner], Callable[[], None]]] = {}
        self._queues: dict[Owner, deque[_Waiter[Owner]]] = {}  # in the order of their turns
        self._waiting = 0
        self._admitting = False  # scheduled

    @property
    def waiting(self) -> int:
        """Number of those that wait."""
        return self._waiting

    @property
    def most(self) -> int:
        """What the owner has that has most."""
        return max(self._owners.values(), default=0)

    def of(self, owner: Owner) -> int:
        """Return what an owner has."""
        return self._owners.get(owner, 0)

    def awaited_by_others(self, owner: Owner) -> bool:
        """Return whether anybody else waits."""
        return any(one != owner for one in self._queues)

    def full(self, owner: Owner, size: int = 1, part: Hashable = None) -> Full | None:
        """Return what has no room for `size` more, None if there is room."""
        if self._part is not None and (has := self._parts.get((owner, part))) and has + size > self._part:
            return Full("this connection", self._part, "part")
        has, each = self._owners.get(owner), self._each if isinstance(self._each, int) else self._each(owner)
        if has and has + size > each:
            return Full(self._name, each, "owner")
        if self.total is not None and self.held and self.held + size > self.total:
            return Full("this gateway", self.total, "all")
        return None

    def refusal(self, full: Full, size: int = 1) -> RateLimited:
        """Return the error that names what is full."""
        return RateLimited(
            f"{full.name} has too many {self.what} (the limit is {full.limit}); {self._hint}",
            limit=full.limit,
            retry_after=self._retry_after,
        )

    # --- at once ------------------------------------------------------------------------------------

    def hold(self, owner: Owner, size: int = 1, *, part: Hashable = None) -> Reservation[Owner]:
        """Count what exists already, regardless of limits."""
        reservation = Reservation(self, owner, part)
        reservation.hold(size)
        return reservation

    def reserve(
        self,
        owner: Owner,
        size: int = 1,
        *,
        part: Hashable = None,
        displaced: Callable[[], None] | None = None,
    ) -> Reservation[Owner]:
        """Take `size` now. Raises `RateLimited`, naming what is full.

        With `displaced` it may be given to another if all owners together have too many: then it is released
        and `displaced` is called. The oldest such one of the owner with the most gives way.
        """
        while (full := self.full(owner, size, part)) is not None:
            if displaced is None or full.of != "all" or not self.displace():
                raise self.refusal(full, size)
        reservation = self.hold(owner, size, part=part)
        if displaced is not None:
            self._displaceable.setdefault(owner, {})[reservation] = displaced
        return reservation

    def displace(self) -> bool:
        """End the oldest displaceable use of the owner with the most; return whether there was one."""
        if not self._displaceable:
            return False
        found = self._displaceable[max(self._displaceable, key=lambda one: len(self._displaceable[one]))]
        reservation, displaced = next(iter(found.items()))
        reservation.release()
        displaced()
        return True

    def _forget(self, reservation: Reservation[Owner], owner: Owner) -> None:
        if (found := self._displaceable.get(owner)) is not None:
            found.pop(reservation, None)
            if not found:
                del self._displaceable[owner]

    def _count(self, owner: Owner, part: Hashable, size: int) -> None:
        self.held += size
        _add(self._owners, owner, size)
        if part is not None and self._part is not None:
            _add(self._parts, (owner, part), size)
        if size < 0 and self._queues:
            self._wake()

    # --- in turn ------------------------------------------------------------------------------------

    async def acquire(self, owner: Owner, size: int = 1, *, part: Hashable = None) -> Reservation[Owner]:
        """Wait for room, in turn, and take `size`. Raises `RateLimited` if too many wait, or for too long."""
        room = self.full(owner, size, part) is None
        if room and not self._queues:
            return self.hold(owner, size, part=part)
        loop = asyncio.get_running_loop()
        self._make_way(owner, size, part)
        waiter = _Waiter(owner, part, size, loop.create_future())
        self._queues.setdefault(owner, deque()).append(waiter)
        self._waiting += 1
        if self._patience is not None:
            waiter.expiry = loop.call_later(self._patience, self._refuse, waiter)
        if room:  # those before it may have none
            self._admit()
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled() or not waiter.granted.done():
                self._drop(waiter)
            elif waiter.granted.exception() is None:
                waiter.granted.result().release()  # granted at the same moment
            raise

    @contextlib.asynccontextmanager
    async def slot(self, owner: Owner, size: int = 1) -> AsyncIterator[None]:
        """Wait for room, and keep it while the context is open. Raises what `acquire` raises."""
        with await self.acquire(owner, size):
            yield

    def _make_way(self, owner: Owner, size: int, part: Hashable) -> None:
        """Refuse one if too many wait: the last of the owner with the most, unless that is this one."""
        if self._most_waiting is None or self._waiting < self._most_waiting:
            return
        most = max(self._queues.values(), key=len, default=None)
        if most is None or len(most) <= len(self._queues.get(owner, ())) + 1:
            full = self.full(owner, size, part) or Full("the queue", self._most_waiting, "all")
            raise self.refusal(full, size)
        self._refuse(most[-1])

    def _refuse(self, waiter: _Waiter[Owner]) -> None:
        if not waiter.granted.done():
            full = self.full(waiter.owner, waiter.size, waiter.part)
            full = full or Full("the queue", self._waiting, "all")
            waiter.granted.set_exception(self.refusal(full, waiter.size))
        self._drop(waiter)

    def _drop(self, waiter: _Waiter[Owner]) -> None:
        """Take one out of its queue, which may have been what others waited for."""
        queue = self._queues.get(waiter.owner)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            self._left(waiter)
            self._wake()

    def _left(self, waiter: _Waiter[Owner]) -> None:
        self._waiting -= 1
        if waiter.expiry is not None:
            waiter.expiry.cancel()
        if not self._queues[waiter.owner]:
            del self._queues[waiter.owner]

    def _wake(self) -> None:
        if self._queues and not self._admitting:
            self._admitting = True
            asyncio.get_running_loop().call_soon(self._admit)

    def _admit(self) -> None:
        """Grant what there is room for: one of each owner in turn, as often as that is possible."""
        self._admitting, granted, before = False, 0, -1
        while granted != before:
            before = granted
            for owner in list(self._queues):
                waiter, full = self._next(owner)
                if full is not None and full.of == "all":
                    return  # nobody overtakes, or what is large would wait forever
                if full is not None:
                    continue
                if granted == _GRANTED:
                    self._wake()
                    return
                granted += 1
                queue = self._queues.pop(owner)
                queue.remove(waiter)
                self._queues[owner] = queue  # behind the others
                self._left(waiter)
                if not waiter.granted.done():
                    waiter.granted.set_result(self.hold(owner, waiter.size, part=waiter.part))

    def _next(self, owner: Owner) -> tuple[_Waiter[Owner], Full | None]:
        """Return an owner's first waiter whose part has room, and what else has none."""
        queue = self._queues[owner]
        for waiter in queue:
            if waiter.granted.done() and waiter is not queue[-1]:
                continue  # it was cancelled just now, and takes no turn of its owner's
            full = self.full(owner, waiter.size, waiter.part)
            if full is None or full.of != "part":
                break
        return waiter, full


def _add(counts: dict[Owner, int], key: Owner, by: int) -> None:
    if left := counts.get(key, 0) + by:
        counts[key] = left
    else:
        counts.pop(key, None)
