"""What all clients of a gateway share: bytes in flight per socket, per tenant and in total, and sockets.

A budget only counts and refuses; it does not store bytes. It is asked at the edge, before the bytes arrive,
and gets them back once the answer has been passed to the socket. A small request is admitted or refused at
once. A large one may wait; its socket is not read meanwhile, so that TCP slows the client down.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final
from weakref import WeakValueDictionary

from gateway.admission import RETRY_AFTER, Admission, Full, Reservation, descriptors
from gateway.errors import RateLimited
from gateway.settings import Settings

# bytes; messages up to this size are admitted whatever their socket holds, so that a cancel gets through
SMALL: Final = 64 << 10
# overhead of a request besides its bytes: a task, its parameters, a queue entry
REQUEST: Final = 4 << 10

ANONYMOUS: Final = 64  # websockets without a token yet: a browser sends it with its first message
ANONYMOUS_PER_ADDRESS: Final = 16  # of these, so that one address does not take all
WATCHES: Final = 16  # file watches of one websocket, and of a tenant; a worker serves each
TENANT_WATCHES: Final = 64
SUBSCRIPTIONS: Final = 16  # event subscriptions of one websocket, and of a tenant; an event wakes each
TENANT_SUBSCRIPTIONS: Final = 256
_SPARE: Final = 8  # an eighth of each share is reserved for small messages


class Share:
    """Bytes held for one socket or one tenant, bounded by a limit and by the share above it.

    A large message may take at most as much as it leaves free in the share above, so that there is room for
    the next one, however many there are. A share that holds little admits a message of any size. Small
    messages count only towards the tenant's limit; a socket also limits the number of requests.
    """

    __slots__ = ("__weakref__", "_budget", "held", "limit", "name", "tenant")

    def __init__(self, name: str, limit: int, budget: Budget, tenant: Share | None = None) -> None:
        """`tenant` is the share of the tenant whose socket this is, None for a tenant's own."""
        self.name, self.limit, self.held = name, limit, 0
        self._budget, self.tenant = budget, tenant

    def hold(self, size: int) -> None:
        """Count bytes that exist already, regardless of limits; a negative size gives some back."""
        self.held += size
        if self.tenant is not None:
            self.tenant.held += size
        self._budget.add(size)

    def full(self, size: int) -> Full | None:
        """Return what has no room for `size` more bytes, None if there is room."""
        above, after = self.tenant or self._budget, self.held + size
        if size <= SMALL:
            full = self.tenant is None and after > self.limit
        else:
            full = self.held > self.limit // _SPARE and (
                after > self.limit - self.limit // _SPARE or after > above.limit - above.held - size
            )
        if full:
            return Full(self.name, self.limit, "owner" if self.tenant is None else "part")
        return self._budget.overfull(size) if self.tenant is None else self.tenant.full(size)

    def reserve(self, size: int = 0) -> Reservation[Share]:
        """Take `size` bytes. Raises `RateLimited`, naming what is full."""
        reservation = Reservation(self._budget, self.tenant or self, self)
        if size:
            reservation.grow(size)
        return reservation

    async def wait(self, size: int) -> Reservation[Share]:
        """Wait for room, in turn with other tenants, and take `size` bytes."""
        return await self._budget.acquire(self.tenant or self, size, part=self)

    def within(self, limit: int) -> Share:
        """Return a share for one socket of this tenant."""
        return Share("this connection", limit, self._budget, self)


class Budget(Admission[Share]):
    """The total of bytes held, and the tenants' shares. Its owners are these, its parts those of sockets."""

    def __init__(self, limit: int, tenant: int) -> None:
        super().__init__("bytes in flight", each=tenant, total=limit)
        self.limit = limit
        self._tenant = tenant
        # a tenant's share exists as long as something refers to it
        self._tenants: WeakValueDictionary[str, Share] = WeakValueDictionary()

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

    def full(self, owner: Share, size: int = 1, part: Hashable = None) -> Full | None:
        return (part if isinstance(part, Share) else owner).full(size)

    def overfull(self, size: int) -> Full | None:
        """Return this gateway if it has no room for `size` more bytes, whoever wants them."""
        limit = self.limit if size <= SMALL else self.limit - self.limit // _SPARE
        if self.held > self.limit // _SPARE and self.held + size > limit:
            return Full("this gateway", self.limit, "all")
        return None

    def refusal(self, full: Full, size: int = 1) -> RateLimited:
        return RateLimited(
            f"{full.name} has no room for {size} more bytes now; try again when some requests in flight "
            "have been answered",
            limit=full.limit,
            retry_after=RETRY_AFTER,
        )

    def _count(self, owner: Share, part: Hashable, size: int) -> None:
        (part if isinstance(part, Share) else owner).hold(size)

    def add(self, size: int) -> None:
        """Count bytes of a share, whoever's."""
        self.held += size
        if size < 0 and self._queues:
            self._wake()


class ClientLimits:
    """What clients share of one gateway, by tenant (strangers by address); parts are websockets."""

    def __init__(self, settings: Settings) -> None:
        self.bytes = Budget(settings.bytes_in_flight, settings.tenant_bytes)
        most = descriptors() // 4
        # HTTP requests that have shown a token, by tenant or subject
        self.requests = Admission[str]("requests at once", each=most // 2, total=most)
        # websockets and event streams
        self.sockets = Admission[str](
            "connections",
            each=settings.max_tenant_connections,
            total=min(settings.max_connections, most),
            hint="close some",
        )
        # websockets without a token yet: the oldest of the address with the most makes room for another
        self.strangers = Admission[str](
            "connections without a token",
            each=ANONYMOUS_PER_ADDRESS,
            total=ANONYMOUS,
            name="this address",
            hint="send the token with the handshake, or send initialize sooner",
        )
        self.watches = Admission[str](
            "file watches",
            each=TENANT_WATCHES,
            part=WATCHES,
            hint="end some with files/unwatch",
        )
        # every event of any tenant wakes each of them
        self.subscriptions = Admission[str](
            "event subscriptions",
            each=TENANT_SUBSCRIPTIONS,
            part=SUBSCRIPTIONS,
            hint="end some with events/unsubscribe",
        )
