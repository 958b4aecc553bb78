"""The record of a move: its target, progress and outcome. Each member keeps the latest of each tenant.

Takes in tenants from other members, as ordered by their old homes. Each order can be repeated.

The steps of one move to another member.

```
copying     a copy at the new home is refreshed until little is left to copy; the tenant runs and is used
switching   its door is closed, it is stopped, copied a last time; its records go to the new home
decided     a key of the cluster names the new home: before, a failure is undone; from then on it goes on
moved       it runs there, the door opens, and the calls that waited are passed on
```

Each state is on the disk before anything of it happens. So the gateway that starts after one that was killed
knows whether to undo a move or to go on with it.

Moves this member's tenants to other members, with all their records, while their clients wait.

See `gateway.cluster.moves` for the steps of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Final, Literal, Protocol
from weakref import WeakValueDictionary

import orjson

from gateway.admission import Admission
from gateway.cluster.cluster import Cluster
from gateway.cluster.keys import Placements
from gateway.cluster.listener import Order
from gateway.cluster.peers import ASKING, MemberAway, Peer, order
from gateway.cluster.records import Records
from gateway.errors import Conflict, GatewayError, InvalidParams, NotFound, Unavailable
from gateway.events import Bus
from gateway.execs import Execs
from gateway.files.files import Files
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.lifecycle import Lifecycle
from gateway.limits.capacity import Capacity, DiskSpace
from gateway.ownership.names import Names
from gateway.rootfs.workers import Workers
from gateway.runtime import OnAnotherServer, TenantInstance, TenantInstances
from gateway.runtime.incus.moves import COPY_TIMEOUT
from gateway.settings import Settings
from gateway.storage.store import Store
from gateway.tasks import whole

log = logging.getLogger(__name__)

State = Literal["waiting", "copying", "switching", "decided", "arrived", "undoing", "moved", "failed"]
"""Until `decided` a move is undone where it breaks off; from then on it goes on to its end."""

ENDED: Final = ("moved", "failed")


@dataclass(slots=True)
class Move:
    """One move. Times are in seconds since the epoch, `gap` is how many seconds calls waited."""

    tenant: str
    instance: str
    source: str
    target: str
    by: str
    state: State = "waiting"
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    began: float = field(default_factory=time.time)
    ended: float | None = None
    gap: float | None = None
    error: dict[str, Any] | None = None
    running: bool = False  # before it was stopped to be moved
    memory: str | None = None  # its limit
    managed: str | None = None  # the instance's own mark as a tenant
    drained: bool = False  # it is to come back when its member is restored
    leftover: bool = False  # the target could not be told that the move is given up

    @property
    def over(self) -> bool:
        return self.state in ENDED

    def to_dict(self) -> dict[str, Any]:
        """Return it as clients see it."""
        return {
            "id": self.id,
            "tenant": self.tenant,
            "from": self.source,
            "to": self.target,
            "state": self.state,
            "began": self.began,
            "ended": self.ended,
            "gap_ms": None if self.gap is None else int(self.gap * 1000),
            "error": self.error,
            "drained": self.drained,
        }


def parsed(text: bytes) -> Move:
    """Return a stored move, or one that a peer reports. Fields that a newer gateway added are ignored."""
    said: Mapping[str, Any] = orjson.loads(text)
    known = {name: said[name] for name in Move.__dataclass_fields__ if name in said}
    return Move(**known)


class MoveLog:
    """The last move of each tenant, from this member or to it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def save(self, move: Move) -> None:
        """Store a move's state; it is on the disk when this returns. Raises `StoreFailed`."""
        text = orjson.dumps(asdict(move))
        await self._store.write(partial(_save, tenant=move.tenant, identity=move.id, text=text), durable=True)

    async def last(self, tenant: str) -> Move | None:
        """Return the last move of a tenant, None if there was none."""
        text = await self._store.read(partial(_last, tenant=tenant))
        return None if text is None else parsed(text)

    async def unfinished(self) -> list[Move]:
        """Return the moves that have not ended or not been cleaned up."""
        moves = map(parsed, await self._store.read(_all))
        return [move for move in moves if not move.over or move.leftover]


def _save(connection: sqlite3.Connection, tenant: str, identity: str, text: bytes) -> None:
    connection.execute("INSERT OR REPLACE INTO moves VALUES (?, ?, ?)", (tenant, identity, text))


def _last(connection: sqlite3.Connection, tenant: str) -> bytes | None:
    row = connection.execute("SELECT record FROM moves WHERE tenant = ?", (tenant,)).fetchone()
    return None if row is None else bytes(row[0])


def _all(connection: sqlite3.Connection) -> list[bytes]:
    return [bytes(row[0]) for row in connection.execute("SELECT record FROM moves")]


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
        tenants: TenantInstances,
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


CALLS: Final = 1.0  # seconds for running calls to finish before their tenant is stopped
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
        tenants: TenantInstances,
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
            await self._order(move, COPY, COPY_TIMEOUT)
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
        await self._doors.empty(tenant, CALLS)
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
        both = (self._order(move, LAST_COPY, COPY_TIMEOUT), self._send_records(move))
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


_ORDERS: Final = 2  # version of the peers' protocol that has moves


class Departures:
    """The moves from this member, a limited number at a time.

    `deploying` says whether a tenant's site is being deployed, and `changed` is called with one whose move
    has ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        tenants: TenantInstances,
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
        self._gone: dict[str, TenantInstance] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def moving(self, tenant: str) -> bool:
        """Return whether a tenant is moving away, or has a move that has not been undone yet."""
        return tenant in self._moves

    def keeps(self, tenant: str) -> bool:
        """Return whether a tenant is still ours although there may be no instance of its name."""
        return tenant in self._mover.leaving

    def listed(self) -> Sequence[TenantInstance]:
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
