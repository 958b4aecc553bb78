"""Moves this member's tenants to other members, with all their records, while their clients wait.

See `gateway.lifecycle.mover` for the steps of one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from gateway.admission import Admission
from gateway.cluster.cluster import Cluster
from gateway.cluster.peers import ASKING, MemberAway
from gateway.errors import Conflict, GatewayError, Unavailable
from gateway.events import Bus
from gateway.lifecycle.lifecycle import Lifecycle
from gateway.lifecycle.move import Move, MoveLog
from gateway.lifecycle.mover import Mover
from gateway.runtime import Tenant, Tenants
from gateway.settings import Settings

log = logging.getLogger(__name__)

_ORDERS: Final = 2  # version of the peers' protocol that has moves


class Departures:
    """The moves from this member, a limited number at a time.

    `deploying` says whether a tenant's site is being deployed, and `changed` is called with one whose move
    has ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        tenants: Tenants,
        mover: Mover,
        lifecycle: Lifecycle,
        log_: MoveLog,
        bus: Bus,
        settings: Settings,
        deploying: Callable[[str], bool],
        changed: Callable[[str], None],
    ) -> None:
        self._cluster, self._tenants, self._mover = cluster, tenants, mover
        self._lifecycle, self._log, self._bus = lifecycle, log_, bus
        self._deploying, self._changed = deploying, changed
        self._slots = Admission[str]("moves", each=1, total=settings.moves_at_once)
        self._resting = False
        self._moves: dict[str, Move] = {}
        self._found: list[Move] = []  # by `recover`
        self._gone: dict[str, Tenant] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def moving(self, tenant: str) -> bool:
        """Return whether a tenant is moving away, or has a move that has not been undone yet."""
        return tenant in self._moves

    def keeps(self, tenant: str) -> bool:
        """Return whether a tenant is still ours although there may be no instance of its name."""
        return tenant in self._mover.leaving

    def listed(self) -> Sequence[Tenant]:
        """Return the tenants that have all but arrived at their new home, for our lists to include them.

        A tenant on its way has no instance for a moment. A request to all members may get its new home's
        answer from before it arrived, so our answer includes it for as long as such an answer may take.
        """
        elsewhere = self._cluster.homes.home
        return [one for name, one in self._gone.items() if self.keeps(name) or elsewhere(name) is not None]

    async def last(self, tenant: str) -> Move | None:
        """Return the tenant's move that is under way, or the last one that this member knows of."""
        return self._moves.get(tenant) or await self._log.last(tenant)

    async def begin(self, tenant: str, target: str, by: str, *, drained: bool = False) -> Move:
        """Begin to move a tenant of this member; return at once. Repeating the call returns the same move.

        Raises `InvalidParams` for an unknown member, `MemberAway`, `NotFound`, and `Conflict` if the tenant
        is being moved elsewhere or deployed.
        """
        if self._resting:
            raise Unavailable("the gateway is being replaced; try again", retry_after=1)
        peer = self._mover.peer(target)
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
                f"the gateway of {target} is too old to take {tenant}; upgrade it first", reason="older"
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
        """Load the moves of an earlier process and close their doors. `resume` continues them."""
        for move in await self._log.unfinished():
            if move.source != self._cluster.own:
                continue
            self._found.append(move)
            if not move.over:
                self._moves[move.tenant] = move
            if move.state in ("switching", "decided"):
                self._mover.shut(move.tenant)

    async def resume(self) -> None:
        """Undo or finish the moves that `recover` found."""
        found, self._found = self._found, []
        for move in found:
            self._spawn(self._mover.tidy(move) if move.over else self._finish(move))

    async def rest(self, seconds: float) -> None:
        """Begin no more moves, and wait until those under way have ended.

        Raises `Unavailable` if some take longer than `seconds`, and begins again.
        """
        self._resting = True
        if self._moves and self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        if self._moves:
            self._resting = False
            raise Unavailable(
                f"{len(self._moves)} tenants are still being moved to other members after {seconds:.0f} s; "
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

    async def _run(self, move: Move) -> None:
        try:
            async with self._slots.slot(move.tenant):
                await self._mover.copy(move)
                async with self._lifecycle.alone(move.tenant):
                    self._gone[move.tenant] = replace(
                        await self._tenants.get(move.tenant), location=move.target, address=None
                    )
                    await self._mover.switch(move)
        except GatewayError as error:
            move.error = {"code": error.code, "message": error.message, **error.facts}
        except Exception:
            log.exception("the move of %s failed", move.tenant)
            move.error = {"code": "unavailable", "message": "the gateway failed; its log says why"}
        await self._finish(move)

    async def _finish(self, move: Move) -> None:
        """Finish a move from whatever state it is in, however long that takes."""
        await self._mover.finish(move)
        self._moves.pop(move.tenant, None)
        self._forget(move)
        self._changed(move.tenant)
        await self._mover.tidy(move)

    def _forget(self, move: Move) -> None:
        """List a tenant no more: at once if it has stayed."""
        if (gone := self._gone.get(move.tenant)) is None:
            return

        def end() -> None:
            if self._gone.get(move.tenant) is gone:  # else it is about to go again
                del self._gone[move.tenant]

        if move.state == "moved":
            asyncio.get_running_loop().call_later(2 * ASKING, end)
        else:
            end()
