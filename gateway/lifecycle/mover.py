"""The steps of one move to another member.

```
copying     a copy at the new home is refreshed until little is left to copy; the tenant runs and is used
switching   its door is closed, it is stopped, copied a last time; its records go to the new home
decided     a key of the cluster names the new home: before, a failure is undone; from then on it goes on
moved       it runs there, the door opens, and the calls that waited are passed on
```

Each state is on the disk before anything of it happens. So the gateway that starts after one that was killed
knows whether to undo a move or to go on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import orjson

from gateway.cluster.cluster import Cluster
from gateway.cluster.orders import order
from gateway.cluster.peers import Peer
from gateway.cluster.placements import Placements
from gateway.cluster.records import Records
from gateway.errors import Conflict, GatewayError, InvalidParams, NotFound, Unavailable
from gateway.events import Bus
from gateway.execs import Execs
from gateway.files.files import Files
from gateway.lifecycle.arrivals import ARRIVE, COPY, DROP, LAST_COPY, TIDY
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.move import Move, MoveLog
from gateway.ownership.names import Names
from gateway.rootfs.workers import Workers
from gateway.runtime import Tenants
from gateway.settings import Settings

log = logging.getLogger(__name__)

_ROUNDS: Final = 4  # copies at most, before the tenant is stopped
_BRIEF: Final = 2.0  # seconds that the last copy before takes, where the next one is as short
_ENDS: Final = 2.0  # seconds for commands to be recorded as lost
_ORDER: Final = 60.0  # seconds for an order that is no copy
_PAUSES: Final = (0.2, 10.0)  # seconds between two attempts to go on, the first and the longest
_SEEN: Final = 2.0  # seconds until this gateway has heard that the tenant is at its new home


class OldHome(Protocol):
    """What a runtime does for a tenant that leaves; see `gateway.runtime.incus.moves`."""

    async def managed(self, tenant: str) -> str | None: ...

    async def snapshot(self, tenant: str, number: int) -> None: ...

    async def forget_snapshots(self, tenant: str, but: int | None = None) -> None: ...

    async def put_aside(self, tenant: str, instance: str, move: str) -> None: ...

    async def bring_back(self, tenant: str, instance: str, move: str, managed: str | None) -> None: ...

    async def discard_old(self, move: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Uses:
    """All that uses a tenant here. `part` closes its connections."""

    doors: Doors
    part: Callable[[str], None]
    execs: Execs
    files: Files
    workers: Workers

    async def end(self, tenant: str) -> None:
        """End every use, and report the tenant's commands as lost by a move."""
        self.part(tenant)
        await self.execs.lose(tenant, "moved", _ENDS)
        self.doors.end_streams(tenant)  # they have told that
        await self.files.forget(tenant, "moved")
        await self.workers.forget(tenant)


class Mover:
    """Takes tenants through the steps. The runtime leaves the tenants in `leaving` alone.

    `deploying` says whether a tenant's site is being deployed.
    """

    def __init__(
        self,
        cluster: Cluster,
        placements: Placements,
        tenants: Tenants,
        steps: OldHome,
        uses: Uses,
        leaving: set[str],
        records: Records,
        names: Names,
        log_: MoveLog,
        bus: Bus,
        settings: Settings,
        deploying: Callable[[str], bool],
    ) -> None:
        self._cluster, self._placements, self._tenants = cluster, placements, tenants
        self._steps, self._uses, self._doors, self.leaving = steps, uses, uses.doors, leaving
        self._records, self._names, self._log, self._bus = records, names, log_, bus
        self._settings, self._deploying = settings, deploying

    def peer(self, member: str) -> Peer:
        """Return the peer of a member. Raises `InvalidParams` if there is none, or if it is this one."""
        if member == self._cluster.own:
            raise InvalidParams(f"it is already on {member}", field="member")
        peer = self._cluster.peers.all.get(member)
        if peer is None:
            raise InvalidParams(f"{member[:63]} is not a member of the cluster", field="member")
        return peer

    def shut(self, tenant: str) -> None:
        """Keep everybody from using a tenant, as during the switch."""
        self._doors.close(tenant)
        self._leave_alone(tenant)

    async def copy(self, move: Move) -> None:
        """Copy while the tenant is in use, until what is left takes little time."""
        await self._enter(move, "copying")
        move.managed = await self._steps.managed(move.tenant)
        for number in range(_ROUNDS):
            await self._steps.snapshot(move.tenant, number)
            began = time.monotonic()
            await self._order(move, COPY, self._settings.move_copy_timeout)
            await self._steps.forget_snapshots(move.tenant, number)
            if number and time.monotonic() - began < _BRIEF:
                return

    async def switch(self, move: Move) -> None:
        """Stop the tenant, transfer the rest of it to the new home, and decide."""
        tenant = move.tenant
        if self._deploying(tenant):
            raise Conflict(f"the site of {tenant} is being deployed; wait for that", reason="deploying")
        began = time.monotonic()
        move.running = (await self._tenants.get(tenant)).status == "running"
        await self._enter(move, "switching")
        self._doors.close(tenant)
        await self._doors.empty(tenant, self._settings.move_calls)
        self._leave_alone(tenant)
        await self._uses.end(tenant)
        stopped = time.monotonic()
        if move.running:
            await self._tenants.stop(tenant)
            await self._uses.workers.forget(tenant)  # what may have begun meanwhile
        copied = time.monotonic()
        await self._send_rest(move)
        sent = time.monotonic()
        await self._placements.move(tenant, move.target, move.id)
        move.gap = time.monotonic() - began  # so far
        await self._enter(move, "decided")
        decided = time.monotonic()
        await self._go_on(move)
        move.state = "arrived"
        move.gap = time.monotonic() - began
        log.info(
            "%s is on %s: calls ended in %.2f s, stopped in %.2f, copied in %.2f, decided in %.2f, "
            "named and started in %.2f",
            *(tenant, move.target, stopped - began, copied - stopped, sent - copied, decided - sent),
            time.monotonic() - decided,
        )

    async def _send_rest(self, move: Move) -> None:
        """Have the new home fetch the rest of the disk and the records.

        Nothing is on its way any more if one of them fails: it would come there after the order to drop it.
        """
        both = (self._order(move, LAST_COPY, self._settings.move_copy_timeout), self._send_records(move))
        for result in await asyncio.gather(*both, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _send_records(self, move: Move) -> None:
        text = await self._records.export(move.tenant, move.instance, move.id)
        await self._cluster.send_records(self.peer(move.target), text, _ORDER)

    async def _go_on(self, move: Move) -> None:
        """Have the new home start serving the tenant."""
        await self._steps.put_aside(move.tenant, move.instance, move.id)
        await self._order(move, ARRIVE, _ORDER)

    async def _arrived(self, move: Move) -> bool:
        """Continue a decided move; return False if the new home is gone and everything is as before."""
        if await self._placements.is_member(move.target):
            await self._go_on(move)
            return True
        await self._steps.bring_back(move.tenant, move.instance, move.id, move.managed)
        move.error = {"code": "unavailable", "message": f"{move.target} is no longer a member of the cluster"}
        return False

    async def _order(self, move: Move, what: str, patience: float) -> None:
        body = orjson.dumps(asdict(move))
        peer = self.peer(move.target)
        await order(self._cluster.peers, peer, f"/peer/do/{what}", body, patience)

    async def _enter(self, move: Move, state: Any) -> None:
        move.state = state
        await self._log.save(move)

    # --- its end ------------------------------------------------------------------------------------

    async def finish(self, move: Move) -> None:
        """Bring a move to its end, whatever happened so far, however long that takes."""
        if move.state == "switching" and await self._stubborn(
            move, lambda: self._placements.decided(move.tenant, move.id)
        ):
            move.state = "decided"  # which was not certain
        if move.state == "decided" and await self._stubborn(move, lambda: self._arrived(move)):
            move.state = "arrived"
        if move.state == "arrived":
            move.error = None
            await self._stubborn(move, lambda: self._left(move))
        else:
            await self._stubborn(move, lambda: self._undo(move))
        self._leave_alone(move.tenant, False)
        self._doors.open(move.tenant)

    def _leave_alone(self, tenant: str, alone: bool = True) -> None:
        for tenants in (self.leaving, self._names.moving):
            (tenants.add if alone else tenants.discard)(tenant)

    async def _stubborn(self, move: Move, work: Callable[[], Awaitable[Any]]) -> Any:
        """Repeat work that can be repeated until it succeeds."""
        pause, longest = _PAUSES
        while True:
            try:
                return await work()
            except GatewayError as error:
                log.warning("the move of %s (%s) is held up: %s", move.tenant, move.state, error.message)
            except Exception:
                log.exception("the move of %s (%s) is held up", move.tenant, move.state)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _left(self, move: Move) -> None:
        """Forget the tenant here, and wait until this gateway has heard where it is."""
        await self._names.leave(move.tenant)
        await self._records.leave(move.tenant)
        peer = self.peer(move.target)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SEEN):
                while move.tenant not in peer.tenants:
                    await self._cluster.homes.next()
        move.state, move.ended, move.leftover = "moved", time.time(), True
        await self._log.save(move)

    async def tidy(self, move: Move) -> None:
        """Remove what nobody needs any more. The tenant is in use again already."""
        if move.state == "moved":
            await self._stubborn(move, lambda: self._steps.discard_old(move.id))
            await self._stubborn(move, lambda: self._tell(move, TIDY))
            with contextlib.suppress(Unavailable):  # it goes by itself, only later
                await self._placements.settle(move.tenant, move.target, move.id)
        else:
            await self._stubborn(move, lambda: self._tell(move, DROP))
        last = await self._log.last(move.tenant)
        if last is not None and last.id == move.id:  # else there is a newer one
            move.leftover = False
            await self._log.save(move)

    async def _tell(self, move: Move, what: str) -> None:
        with contextlib.suppress(InvalidParams):  # it is no member any more
            await self._order(move, what, _ORDER)

    async def _undo(self, move: Move) -> None:
        """Restore the tenant as it was before the move."""
        tenant, stopped = move.tenant, self._doors.closed(move.tenant)
        if move.state != "undoing":
            await self._enter(move, "undoing")
        self._leave_alone(tenant, False)
        if stopped and move.running:
            with contextlib.suppress(NotFound):
                await self._tenants.start(tenant)
        self._doors.open(tenant)
        with contextlib.suppress(NotFound):  # it was destroyed meanwhile
            await self._steps.forget_snapshots(tenant)
        move.state, move.ended, move.leftover = "failed", time.time(), True
        if move.error is None:
            move.error = {"code": "unavailable", "message": "the gateway was stopped during the move"}
        await self._log.save(move)
        facts = {"from": move.source, "to": move.target, "by": move.by, "error": move.error}
        self._bus.publish("tenant.move.failed", tenant, facts)
