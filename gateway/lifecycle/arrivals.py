"""Takes in tenants from other members, as ordered by their old homes. Each order can be repeated."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

from gateway.cluster.listener import Order
from gateway.cluster.peers import Peer
from gateway.cluster.records import Records
from gateway.errors import NotFound
from gateway.events import Bus
from gateway.lifecycle.move import Move, MoveLog, parsed
from gateway.limits.capacity import Capacity, DiskSpace
from gateway.ownership.names import Names
from gateway.runtime import OnAnotherServer, Tenants
from gateway.tasks import whole

log = logging.getLogger(__name__)

COPY: Final = "move-copy"
LAST_COPY: Final = "move-last-copy"
ARRIVE: Final = "move-arrive"
DROP: Final = "move-drop"
TIDY: Final = "move-tidy"


class NewHome(Protocol):
    """What a runtime does for a tenant that arrives; see `gateway.runtime.incus.moves`."""

    async def copy(self, tenant: str, instance: str, move: str, *, last: bool = False) -> None: ...

    async def take_over(self, tenant: str, instance: str, move: str, managed: str | None) -> None: ...

    async def discard_copy(self, move: str) -> None: ...

    async def forget_snapshots(self, tenant: str, but: int | None = None) -> None: ...


class Arrivals:
    """The tenants that arrive at this member. `changed` is called for each that is here."""

    def __init__(
        self,
        own: str,
        tenants: Tenants,
        steps: NewHome,
        records: Records,
        names: Names,
        log_: MoveLog,
        bus: Bus,
        room: DiskSpace,
        capacity: Capacity,
        changed: Callable[[str], None],
    ) -> None:
        self._own, self._tenants, self._steps = own, tenants, steps
        self._records, self._names, self._log = records, names, log_
        self._bus, self._room, self._capacity = bus, room, capacity
        self._changed = changed
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def orders(self) -> Mapping[str, Order]:
        """Return the orders that old homes may give, by name."""

        def order(work: Callable[[Move], Any]) -> Order:
            async def run(peer: Peer, body: bytes) -> Any:
                move = parsed(body)
                if move.target != self._own or move.source != peer.name:
                    raise NotFound(f"{move.id} is not a move from {peer.name} to this member")
                async with self._turns.setdefault(move.id, asyncio.Lock()):
                    return await work(move)

            return run

        return {
            COPY: order(self._copy),
            LAST_COPY: order(self._last_copy),
            ARRIVE: order(self._arrive),
            DROP: order(self._drop),
            TIDY: order(self._tidy),
        }

    async def _copy(self, move: Move) -> Any:
        """Make or refresh the copy, if there is room for the tenant."""
        await self._room.admit()
        if move.running:
            async with self._capacity.promise(move.tenant, move.memory):
                pass  # refused now rather than when it is stopped
        await self._steps.copy(move.tenant, move.instance, move.id)
        return {}

    async def _last_copy(self, move: Move) -> Any:
        await self._steps.copy(move.tenant, move.instance, move.id, last=True)
        return {}

    async def _drop(self, move: Move) -> Any:
        """Remove everything that belongs to a cancelled move."""
        await self._records.drop(move.tenant, move.id)
        await self._steps.discard_copy(move.id)
        return {}

    async def _tidy(self, move: Move) -> Any:
        """Remove what copying left behind on a tenant that has arrived."""
        with contextlib.suppress(NotFound, OnAnotherServer):  # it is gone already
            await self._steps.forget_snapshots(move.tenant)
        return {}

    async def _arrive(self, move: Move) -> Any:
        """Turn the copy into the tenant, with its records, and start it."""
        self._names.moving.add(move.tenant)
        try:
            return await whole(self._arrived(move))
        finally:
            self._names.moving.discard(move.tenant)

    async def _arrived(self, move: Move) -> Any:
        began = time.monotonic()
        # first its records and its name: by its first event here it must be known
        header = await self._records.adopt(move.tenant, move.id)
        await self._names.arrive(move.tenant, move.instance, header.ended)
        await self._steps.take_over(move.tenant, move.instance, move.id, move.managed)
        known = await self._log.last(move.tenant)
        if known is None or known.id != move.id:
            told = {"from": move.source, "to": move.target, "by": move.by}
            self._bus.publish("tenant.moved", move.tenant, told)
            move.state = "arrived"
            await self._log.save(move)
        named = time.monotonic()
        if move.running:
            await self._tenants.start(move.tenant)
        move.state, move.ended = "moved", time.time()
        if move.gap is not None:
            move.gap += time.monotonic() - began
        await self._log.save(move)
        self._changed(move.tenant)
        log.info(
            "%s arrived from %s: named in %.2f s, started in %.2f",
            *(move.tenant, move.source, named - began, time.monotonic() - named),
        )
        return {}
