"""Moves tenants of this member to another one, with all that is kept of them, while their clients wait.

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
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from typing import Any, Final, Protocol

import orjson

from gateway.cluster.cluster import Cluster
from gateway.cluster.orders import order
from gateway.cluster.peers import MemberAway, Peer
from gateway.cluster.placements import Placements
from gateway.cluster.records import Records
from gateway.errors import Conflict, GatewayError, InvalidParams, NotFound, Unavailable
from gateway.events import Bus
from gateway.execs import Execs
from gateway.files.files import Files
from gateway.lifecycle.arrivals import ARRIVE, COPY, DROP, LAST_COPY, TIDY
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.lifecycle import Lifecycle
from gateway.lifecycle.move import Move, MoveLog
from gateway.ownership.names import Names
from gateway.rootfs.workers import Workers
from gateway.runtime import Tenants
from gateway.settings import Settings

log = logging.getLogger(__name__)

_ORDERS: Final = 2  # version of the peers' protocol that has moves
_ROUNDS: Final = 4  # copies at most, before the tenant is stopped
_BRIEF: Final = 2.0  # seconds that the last copy before takes, where the next one is as short
_ENDS: Final = 2.0  # seconds for commands to be recorded as lost
_ORDER: Final = 60.0  # seconds for an order that is no copy
_PAUSES: Final = (0.2, 10.0)  # seconds between two attempts to go on, the first and the longest
_SEEN: Final = 2.0  # seconds until this gateway has heard that the tenant is at its new home


class OldHome(Protocol):
    """What a runtime does for a tenant that goes; see `gateway.runtime.incus.moves`."""

    async def managed(self, tenant: str) -> str | None: ...

    async def snapshot(self, tenant: str, number: int) -> None: ...

    async def forget_snapshots(self, tenant: str, but: int | None = None) -> None: ...

    async def put_aside(self, tenant: str, instance: str, move: str) -> None: ...

    async def bring_back(self, tenant: str, instance: str, move: str, managed: str | None) -> None: ...

    async def discard_old(self, move: str) -> None: ...


class Departures:
    """The moves from this member. `leaving` are tenants that the runtime is to leave alone.

    `part` closes the tenant's connections, `deploying` says whether its site is being deployed, and `changed`
    is called with one whose move has ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        placements: Placements,
        tenants: Tenants,
        steps: OldHome,
        leaving: set[str],
        doors: Doors,
        lifecycle: Lifecycle,
        execs: Execs,
        workers: Workers,
        files: Files,
        records: Records,
        names: Names,
        log_: MoveLog,
        bus: Bus,
        settings: Settings,
        part: Callable[[str], None],
        deploying: Callable[[str], bool],
        changed: Callable[[str], None],
    ) -> None:
        self._cluster, self._placements = cluster, placements
        self._tenants, self._steps, self._leaving = tenants, steps, leaving
        self._doors, self._lifecycle, self._settings = doors, lifecycle, settings
        self._execs, self._workers, self._files = execs, workers, files
        self._records, self._names, self._log, self._bus = records, names, log_, bus
        self._part, self._deploying, self._changed = part, deploying, changed
        self._slots = asyncio.Semaphore(settings.moves_at_once)
        self._resting = False
        self._moves: dict[str, Move] = {}
        self._found: list[Move] = []  # by `recover`
        self._tasks: set[asyncio.Task[None]] = set()

    def moving(self, tenant: str) -> bool:
        """Return whether a tenant is about to go, or has a move that is not undone yet."""
        return tenant in self._moves

    def keeps(self, tenant: str) -> bool:
        """Return whether a tenant is still ours although there may be no instance of its name."""
        return tenant in self._leaving

    async def last(self, tenant: str) -> Move | None:
        """Return the tenant's move that is under way, or the last one that this member knows of."""
        return self._moves.get(tenant) or await self._log.last(tenant)

    async def begin(self, tenant: str, target: str, by: str, *, drained: bool = False) -> Move:
        """Begin to move a tenant of this member; return at once. The same again returns the same move.

        Raises `InvalidParams` for what is no member, `MemberAway`, `NotFound`, and `Conflict` if the tenant
        is being moved elsewhere or deployed.
        """
        if self._resting:
            raise Unavailable("the gateway is just being replaced; ask again", retry_after=1)
        peer = self._peer(target)
        found = await self._tenants.get(tenant)
        if (move := self._moves.get(tenant)) is not None:
            if move.target == target:
                return move
            raise Conflict(f"{tenant} is being moved to {move.target}; wait for that", reason="moving")
        if self._deploying(tenant):
            raise Conflict(f"the site of {tenant} is being deployed; wait for that", reason="deploying")
        if not peer.alive:
            raise MemberAway(target)
        if peer.version < _ORDERS:
            raise Unavailable(
                f"the gateway of {target} is older than moves; upgrade it first", reason="older"
            )
        move = Move(tenant, found.instance or "", self._cluster.own, target, by, drained=drained)
        move.running, move.memory = found.status == "running", found.limits.get("memory")
        self._moves[tenant] = move
        try:
            await self._log.save(move)
        except BaseException:
            del self._moves[tenant]
            raise
        self._bus.publish("tenant.moving", tenant, {"from": move.source, "to": target, "by": by})
        self._spawn(self._run(move))
        return move

    async def recover(self) -> None:
        """Take up the moves of an earlier process: close their doors. `resume` goes on with them."""
        for move in await self._log.unfinished():
            if move.source != self._cluster.own:
                continue
            self._found.append(move)
            if not move.over:
                self._moves[move.tenant] = move
            if move.state in ("switching", "decided"):
                self._doors.close(move.tenant)
                self._leave_alone(move.tenant)

    async def resume(self) -> None:
        """Undo or finish the moves that `recover` found."""
        found, self._found = self._found, []
        for move in found:
            self._spawn(self._tidy(move) if move.over else self._finish(move))

    async def rest(self, seconds: float) -> None:
        """Begin no move from now on, and wait until those under way have ended.

        Raises `Unavailable` if some take longer than `seconds`, and begins again.
        """
        self._resting = True
        if self._moves and self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        if self._moves:
            self._resting = False
            raise Unavailable(
                f"{len(self._moves)} tenants are still on their way to other members after {seconds:.0f} s; "
                "try again later"
            )

    def go_on(self) -> None:
        """Let moves begin again."""
        self._resting = False

    async def close(self) -> None:
        """Leave all moves to the next process, as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="move")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _peer(self, member: str) -> Peer:
        if member == self._cluster.own:
            raise InvalidParams(f"it is on {member} already", field="member")
        peer = self._cluster.peers.all.get(member)
        if peer is None:
            raise InvalidParams(f"{member[:63]} is no member of the cluster", field="member")
        return peer

    # --- one move -----------------------------------------------------------------------------------

    async def _run(self, move: Move) -> None:
        try:
            async with self._slots:
                await self._copy(move)
                async with self._lifecycle.alone(move.tenant):
                    await self._switch(move)
        except GatewayError as error:
            move.error = {"code": error.code, "message": error.message, **error.facts}
        except Exception:
            log.exception("the move of %s broke off", move.tenant)
            move.error = {"code": "unavailable", "message": "the gateway failed; its log says why"}
        await self._finish(move)

    async def _copy(self, move: Move) -> None:
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

    async def _switch(self, move: Move) -> None:
        """Stop the tenant, bring the rest of it to the new home, and decide."""
        tenant = move.tenant
        if self._deploying(tenant):
            raise Conflict(f"the site of {tenant} is being deployed; wait for that", reason="deploying")
        began = time.monotonic()
        move.running = (await self._tenants.get(tenant)).status == "running"
        await self._enter(move, "switching")
        self._doors.close(tenant)
        await self._doors.empty(tenant, self._settings.move_calls)
        self._leave_alone(tenant)
        self._part(tenant)
        await self._execs.lose(tenant, "moved", _ENDS)
        self._doors.end_streams(tenant)  # they have told that
        await self._files.forget(tenant, "moved")
        await self._workers.forget(tenant)
        stopped = time.monotonic()
        if move.running:
            await self._tenants.stop(tenant)
            await self._workers.forget(tenant)  # what may have begun meanwhile
        copied = time.monotonic()
        await asyncio.gather(
            self._order(move, LAST_COPY, self._settings.move_copy_timeout), self._send_records(move)
        )
        decided = time.monotonic()
        await self._placements.move(tenant, move.target, move.id)
        move.gap = time.monotonic() - began  # so far
        await self._enter(move, "decided")
        await self._go_on(move)
        move.state = "arrived"
        move.gap = time.monotonic() - began
        log.info(
            "%s is on %s: calls ended in %.2f s, stopped in %.2f, copied in %.2f, started in %.2f",
            *(tenant, move.target, stopped - began, copied - stopped),
            *(decided - copied, time.monotonic() - decided),
        )

    async def _send_records(self, move: Move) -> None:
        text = await self._records.export(move.tenant, move.instance, move.id)
        await self._cluster.send_records(self._peer(move.target), text, _ORDER)

    async def _go_on(self, move: Move) -> None:
        """Have the new home take the tenant."""
        await self._steps.put_aside(move.tenant, move.instance, move.id)
        await self._order(move, ARRIVE, _ORDER)

    async def _arrived(self, move: Move) -> bool:
        """Go on with a decided move; return False if there is no new home any more, and it is as before."""
        if await self._placements.is_member(move.target):
            await self._go_on(move)
            return True
        await self._steps.bring_back(move.tenant, move.instance, move.id, move.managed)
        move.error = {"code": "unavailable", "message": f"{move.target} is no member of the cluster any more"}
        return False

    async def _order(self, move: Move, what: str, patience: float) -> None:
        body = orjson.dumps(asdict(move))
        peer = self._peer(move.target)
        await order(self._cluster.peers, peer, f"/peer/do/{what}", body, patience)

    async def _enter(self, move: Move, state: Any) -> None:
        move.state = state
        await self._log.save(move)

    # --- its end ------------------------------------------------------------------------------------

    async def _finish(self, move: Move) -> None:
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
        self._moves.pop(move.tenant, None)
        self._changed(move.tenant)
        await self._tidy(move)

    def _leave_alone(self, tenant: str, alone: bool = True) -> None:
        for tenants in (self._leaving, self._names.moving):
            (tenants.add if alone else tenants.discard)(tenant)

    async def _stubborn(self, move: Move, work: Callable[[], Awaitable[Any]]) -> Any:
        """Repeat work that can be repeated until it succeeds."""
        pause, longest = _PAUSES
        while True:
            try:
                return await work()
            except GatewayError as error:
                log.warning("the move of %s (%s) waits: %s", move.tenant, move.state, error.message)
            except Exception:
                log.exception("the move of %s (%s) waits", move.tenant, move.state)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _left(self, move: Move) -> None:
        """Forget the tenant here, and wait until this gateway has heard where it is."""
        await self._names.leave(move.tenant)
        await self._records.leave(move.tenant)
        peer = self._peer(move.target)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SEEN):
                while move.tenant not in peer.tenants:
                    await self._cluster.homes.next()
        move.state, move.ended, move.leftover = "moved", time.time(), True
        await self._log.save(move)

    async def _tidy(self, move: Move) -> None:
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
        """Have the tenant as it was."""
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
