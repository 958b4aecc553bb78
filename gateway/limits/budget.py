"""Budgets: bytes in flight per socket, per tenant and in total, and numbers of sockets.

A budget only counts and refuses; it does not store bytes. It is asked at the edge, before the bytes arrive,
and gets them back once the answer has been passed to the socket. A small request is admitted or refused at
once. A large one may wait; its socket is not read meanwhile, so that TCP slows the client down.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from types import TracebackType
from typing import Final
from weakref import WeakValueDictionary

from gateway.errors import RateLimited
from gateway.settings import Settings

# bytes; messages up to this size are admitted whatever their socket holds, so that a cancel gets through
SMALL: Final = 64 << 10
# overhead of a request besides its bytes: a task, its parameters, a queue entry
REQUEST: Final = 4 << 10
RETRY_AFTER: Final = 1  # seconds

_SPARE: Final = 8  # an eighth of each share is reserved for small messages
_OFFERS: Final = 16  # waiting requests handled per iteration of the loop


class Share:
    """Bytes held for one socket or one tenant, bounded by a limit and by the parent share.

    A large message may take at most as much as it leaves free in the parent share, so that there is room for
    the next one, however many there are. A share that holds little admits a message of any size. Small
    messages count only towards the tenant's limit; a socket also limits the number of requests.
    """

    __slots__ = ("__weakref__", "_above", "_of_tenant", "held", "limit", "name")

    def __init__(self, name: str, limit: int, above: Share | Budget) -> None:
        self.name = name
        self.limit = limit
        self.held = 0
        self._above = above
        self._of_tenant = isinstance(above, Budget)

    def hold(self, size: int) -> None:
        """Count bytes that exist already, regardless of limits; a negative size releases bytes."""
        self.held += size
        self._above.hold(size)

    def full(self, size: int) -> Share | Budget | None:
        """Return the share that has no room for `size` more bytes, None if all have."""
        above, after = self._above, self.held + size
        if size <= SMALL:
            if after > self.limit and self._of_tenant:
                return self
        elif self.held > self.limit // _SPARE and (
            after > self.limit - self.limit // _SPARE or after > above.limit - above.held - size
        ):
            return self
        return above.full(size)

    def lease(self, size: int = 0) -> Lease:
        """Return a lease of `size` bytes. Raises `RateLimited`, naming the full share."""
        lease = Lease(self)
        if size:
            lease.grow(size)
        return lease

    async def wait(self, size: int) -> Lease:
        """Wait for room and return a lease of `size` bytes."""
        if self.full(size) is None:
            lease = Lease(self)
            lease.hold(size)
            return lease
        return await self.budget.queue(self, size)

    @property
    def budget(self) -> Budget:
        above = self._above
        return above if isinstance(above, Budget) else above.budget

    def within(self, limit: int) -> Share:
        """Return a share for one socket of this tenant."""
        return Share("this connection", limit, self)

    @property
    def above(self) -> Share | Budget:
        return self._above


class Lease:
    """Bytes taken from a share until `end`. A context manager."""

    __slots__ = ("_share", "size")

    def __init__(self, share: Share) -> None:
        self._share = share
        self.size = 0

    def hold(self, size: int) -> None:
        """Count bytes that exist already."""
        self.size += size
        self._share.hold(size)

    def grow(self, size: int) -> None:
        """Request more bytes. Raises `RateLimited`, naming the full share."""
        full = self._share.full(size)
        if full is not None:
            raise RateLimited(
                f"{full.name} has no room for {size} more bytes now; try again when some requests in flight "
                "have been answered",
                limit=full.limit,
                retry_after=RETRY_AFTER,
            )
        self.hold(size)

    def end(self) -> None:
        """Give all back. Idempotent."""
        if self.size:
            self.hold(-self.size)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Budget:
    """The total of bytes held, and the tenants' shares."""

    name: Final = "this gateway"

    def __init__(self, limit: int, tenant: int) -> None:
        self.limit = limit
        self.held = 0
        self._tenant = tenant
        # a tenant's share exists as long as something refers to it
        self._tenants: WeakValueDictionary[str, Share] = WeakValueDictionary()
        self._waiting: deque[tuple[Share, int, asyncio.Future[Lease]]] = deque()
        self._asked = 0  # waiting requests still to be checked in this pass
        self._asking = False

    def tenant(self, name: str) -> Share:
        """Return a tenant's share, which covers all its sockets and requests."""
        share = self._tenants.get(name)
        if share is None:
            share = self._tenants[name] = Share("this tenant", self._tenant, self)
        return share

    @property
    def most(self) -> int:
        """Bytes held by the tenant that holds most."""
        return max((share.held for share in self._tenants.values()), default=0)

    @property
    def waiting(self) -> int:
        """Number of requests waiting for room."""
        return len(self._waiting)

    def hold(self, size: int) -> None:
        self.held += size
        if size < 0 and self._waiting:
            self._asked = len(self._waiting)
            if not self._asking:
                self._asking = True
                asyncio.get_running_loop().call_soon(self._ask)

    def full(self, size: int) -> Budget | None:
        limit = self.limit if size <= SMALL else self.limit - self.limit // _SPARE
        return self if self.held > self.limit // _SPARE and self.held + size > limit else None

    async def queue(self, share: Share, size: int) -> Lease:
        """Wait until `share` has room for `size` bytes; used by `Share.wait`."""
        found: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        entry = (share, size, found)
        self._waiting.append(entry)
        try:
            return await found
        except asyncio.CancelledError:
            if found.done() and not found.cancelled():
                found.result().end()  # granted at the same moment
            elif entry in self._waiting:
                self._waiting.remove(entry)
            raise

    def _ask(self) -> None:
        """Admit waiting requests that fit now, in order and a few at a time, as there may be thousands."""
        for _ in range(min(_OFFERS, self._asked, len(self._waiting))):
            share, size, found = entry = self._waiting.popleft()
            self._asked -= 1
            if found.done():
                continue
            if share.full(size) is None:
                lease = Lease(share)
                lease.hold(size)
                found.set_result(lease)
            else:
                self._waiting.append(entry)
        self._asking = bool(self._asked and self._waiting)
        if self._asking:
            asyncio.get_running_loop().call_soon(self._ask)


class Turns:
    """Admits a socket's calls in order while the size of their possible answers fits into a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = self._free = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, size: int) -> int:
        """Wait for admission; return the size to pass to `leave`."""
        size = min(size, self._limit)
        if size <= self._free and not self._waiting:
            self._free -= size
            return size
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(size)  # admitted at the same moment
            else:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                self.leave(0)  # it may have blocked the next one
            raise
        return size

    def leave(self, size: int) -> None:
        self._free += size
        while self._waiting and self._waiting[0][0] <= self._free:
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= size
                turn.set_result(None)


class Places:
    """Slots for open sockets: those of authenticated clients, per tenant, and a few anonymous ones.

    If there are too many anonymous sockets, the oldest of the address with the most is closed. Authenticated
    ones never are.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._anonymous: OrderedDict[object, tuple[str, Callable[[], None]]] = OrderedDict()
        self._addresses: Counter[str] = Counter()
        self._customers: Counter[str] = Counter()
        self.taken = 0

    @property
    def anonymous(self) -> int:
        """Number of anonymous sockets."""
        return len(self._anonymous)

    def stranger(self, address: str, displaced: Callable[[], None]) -> Callable[[], None]:
        """Take a slot for a client without a token; return an idempotent function that releases it.

        `displaced` is called if another client takes over the slot. Raises `RateLimited` if the address has
        too many.
        """
        settings = self._settings
        if self._addresses[address] >= settings.max_anonymous_per_address:
            raise RateLimited(
                "too many connections from this address without a token; send the token with the handshake, "
                "or send initialize sooner",
                limit=settings.max_anonymous_per_address,
                retry_after=RETRY_AFTER,
            )
        if len(self._anonymous) >= settings.max_anonymous:
            most = self._addresses.most_common(1)[0][0]
            key = next(key for key, (theirs, _) in self._anonymous.items() if theirs == most)
            tell = self._anonymous[key][1]
            self._leave(key)
            tell()
        key = object()
        self._anonymous[key] = (address, displaced)
        self._addresses[address] += 1
        return lambda: self._leave(key)

    def _leave(self, key: object) -> None:
        found = self._anonymous.pop(key, None)
        if found is not None:
            _less(self._addresses, found[0])

    def customer(self, tenant: str) -> Callable[[], None]:
        """Take a slot for a tenant's socket; return an idempotent function that releases it.

        Raises `RateLimited`.
        """
        settings = self._settings
        if self._customers[tenant] >= settings.max_tenant_connections:
            raise RateLimited(
                "this tenant has too many connections; close some",
                limit=settings.max_tenant_connections,
                retry_after=RETRY_AFTER,
            )
        if self.taken >= settings.max_connections:
            raise RateLimited(
                "the gateway has too many connections",
                limit=settings.max_connections,
                retry_after=RETRY_AFTER,
            )
        self._customers[tenant] += 1
        self.taken += 1
        held = [tenant]

        def leave() -> None:
            if held:
                _less(self._customers, held.pop())
                self.taken -= 1

        return leave


def _less(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
