"""Keeps a copy of each tenant of this member on another one, from which an operator can bring it back.

```
home      SHOP ── a copy each `GATEWAY_STANDBY` seconds ──►╮   dies, is removed from the cluster
another   copy of SHOP ◄───────────────────────────────────╯── lost: 503 ── recover ──► SHOP
```

A tenant is lost once its member has been removed from the cluster: only then is its name free, and that
member serves nothing when it comes back. While its member is just away, it waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from gateway.admission import Admission
from gateway.cluster.cluster import Cluster
from gateway.cluster.listener import Order, Question
from gateway.cluster.peers import MemberAway, Peer
from gateway.cluster.records import Records, unsure
from gateway.errors import Conflict, GatewayError, NotFound, Unavailable
from gateway.events import Bus
from gateway.limits.capacity import Capacity
from gateway.ownership.names import Names
from gateway.runtime import TenantInstance, TenantInstances
from gateway.runtime.incus.standby_copies import Replica, Replicas, tell_late
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed
from gateway.tasks import begin

log = logging.getLogger(__name__)

COPIES: Final = "standby-copies"
"""What a peer is asked by for the copies that it has."""
RECOVER: Final = "standby-recover"
"""What a peer is ordered by to bring tenants back."""
_LOOK: Final = 10.0  # seconds between two looks for tenants that are due, at most
_AGAIN: Final = 2.0  # seconds until lost tenants are looked for again, where that failed
_AT_ONCE: Final = 4  # tenants that are brought back at a time: incusd and the disk are shared with all others
_RETRY_AFTER: Final = 5
_NOTICED: Final = 0.1  # seconds between two looks whether Incus has told of what was brought back
_LOOKS: Final = 50
_SENDING: Final = 30.0  # seconds that a peer may take to keep a tenant's records
_LATE: Final = 3  # intervals after which a copy that is not up to date is reported
# what Incus says of a snapshot of which a power cut, or a deletion that broke off, has left a part
_BROKEN: Final = re.compile(r"matching subvolume|record count|snapshot .*not found|no such file", re.I)
_QUIET: Final = ("running", "stopped", "frozen")

Changed = Callable[[str, str, str], Awaitable[bool]]
"""Takes a tenant, its workspace and a snapshot; returns whether anything of the tenant has changed since."""


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """The copy that a member has of the tenant's `instance`, made `at`, in seconds since the epoch.

    It is 0.0 while the first one is made: the member may have it all the same.
    """

    instance: str
    member: str
    at: float


class Standby:
    """The copies of this member's tenants on others, and those of others here.

    `members` asks the cluster. Tenants that are `moving` are not copied.
    """

    def __init__(
        self,
        copies: Replicas,
        tenants: TenantInstances,
        cluster: Cluster,
        members: Callable[[], Awaitable[Collection[str]]],
        capacity: Capacity,
        names: Names,
        records: Records,
        store: Store,
        bus: Bus,
        settings: Settings,
        *,
        changed: Changed,
        moving: Callable[[str], bool],
    ) -> None:
        self._copies, self._tenants, self._cluster, self._members = copies, tenants, cluster, members
        self._changed, self._capacity, self._names, self._records = changed, capacity, names, records
        self._store, self._bus, self._settings, self._moving = store, bus, settings, moving
        self._standing: dict[str, ReplicaState] = {}
        self._tried: dict[str, float] = {}  # when each tenant was looked at last, by the monotonic clock
        self._held: set[str | None] = set()  # instances that Incus starts, or not, as the settings say
        self._over: set[str] = set()  # tenants whose copies here are of no use any more
        self._tidying: set[str] = set()  # tenants that are back, whose copies are being deleted
        self._lost: dict[str, Replica] = {}
        self._recovering = asyncio.Lock()
        self._seen: dict[str, tuple[str | None, str]] = {}  # instance and status of each tenant, a look ago
        self._pause = _LOOK
        # when each tenant's copy was up to date last, or first was due, and its interval
        self._fresh: dict[str, tuple[float, float]] = {}
        self._broken: Counter[str] = Counter()  # copies in a row that failed by what an earlier one has left
        self._late: set[str] = set()  # those that were reported
        self._why: dict[str, str] = {}  # there was no new copy

    def of(self, tenant: str) -> Mapping[str, Any] | None:
        """Return a tenant's copy as clients see it, None if there is none."""
        found = self._standing.get(tenant)
        if found is None or not found.at:
            return None
        return {"member": found.member, "of": _iso(found.at), "late": tenant in self.late}

    @property
    def late(self) -> Collection[str]:
        """The tenants without a copy that was up to date within the last three intervals."""
        now = time.monotonic()
        return {name for name, (at, interval) in self._fresh.items() if now - at > _LATE * interval}

    async def recall(self) -> None:
        """Load what an earlier process copied. Raises `StoreFailed`."""
        for tenant, instance, member, at in await self._store.read(_all):
            self._standing[tenant] = ReplicaState(instance, member, at)
        await asyncio.to_thread(tell_late, self._settings.state_dir, ())

    # --- copies -------------------------------------------------------------------------------------

    async def copy(self) -> None:
        """Copy this member's tenants, forever and one at a time."""
        await self.recall()
        await self._cluster.settle()  # who moved to a peer is not taken for destroyed
        while True:
            try:
                await self._copy_all()
            except GatewayError as error:
                log.info("cannot copy tenants now: %s", error.message)
            await asyncio.sleep(self._pause)

    async def _copy_all(self) -> None:
        tenants = {tenant.name: tenant for tenant in await self._tenants.list()}
        for name, standing in list(self._standing.items()):
            tenant = tenants.get(name)
            stays = tenant is not None and tenant.instance == standing.instance and self._interval(tenant)
            peer = self._cluster.peers.all.get(standing.member)
            if not stays and (peer is None or peer.alive):  # else Incus would wait for it
                try:
                    await self._end(name, tenant)
                except GatewayError as error:
                    log.info("cannot delete the copy of %s yet: %s", name, error.message)
        # incusd 6.0.4 crashes where a copy is begun while its source is just being started or stopped
        before, self._seen = self._seen, {name: (one.instance, one.status) for name, one in tenants.items()}
        for tenant in tenants.values():
            if interval := self._interval(tenant):
                at, _ = self._fresh.get(tenant.name, (time.monotonic(), 0.0))
                self._fresh[tenant.name] = at, interval
            else:
                self._fresh.pop(tenant.name, None)
            if self._seen[tenant.name] == before.get(tenant.name) and self._is_due(tenant):
                self._tried[tenant.name] = time.monotonic()
                await self._copy(tenant)
        self._tried = {name: at for name, at in self._tried.items() if name in tenants}
        await self._look_for_late(tenants)
        self._held &= {tenant.instance for tenant in tenants.values()}
        self._pause = min([_LOOK, *filter(None, map(self._interval, tenants.values()))])

    async def _look_for_late(self, tenants: Collection[str]) -> None:
        """Report copies that are older than three intervals, once each, also for `doctor`."""
        self._fresh = {name: fresh for name, fresh in self._fresh.items() if name in tenants}
        late = set(self.late)
        for name in late - self._late:
            shown, seconds = self.of(name) or {}, round(time.monotonic() - self._fresh[name][0])
            why = self._why.get(name, "no other server can have it")
            log.error("%s has had no new copy for %d s: %s", name, seconds, why)
            facts = {"member": shown.get("member"), "of": shown.get("of"), "seconds": seconds}
            self._bus.publish("tenant.standby.late", name, facts)
        if late != self._late:
            self._late = late
            try:
                await asyncio.to_thread(tell_late, self._settings.state_dir, sorted(late))
            except OSError as error:
                log.warning("doctor cannot know which copies are late: %s", error)

    def _interval(self, tenant: TenantInstance) -> float:
        return self._settings.standby if tenant.standby is None else tenant.standby

    def _is_due(self, tenant: TenantInstance) -> bool:
        interval = self._interval(tenant)
        if not interval or tenant.status not in _QUIET or tenant.deployment or tenant.migration:
            return False
        if self._moving(tenant.name) or tenant.name in self._lost or tenant.name in self._tidying:
            return False
        tried = self._tried.get(tenant.name)
        return tried is None or time.monotonic() >= tried + interval

    async def _copy(self, tenant: TenantInstance) -> None:
        name, standing = tenant.name, self._standing.get(tenant.name)
        try:
            workspace = self._settings.workspace
            if tenant.instance not in self._held:
                await self._copies.hold_back(name, held=True)
                self._held.add(tenant.instance)
            made = standing if standing is not None and standing.at else None
            if made is not None and await self._is_unchanged(name, workspace, made):
                self._up_to_date(name)
                return
            member = await self._place(made)
            if member is None:
                return
            if made is None:  # known before it is there, as another member may run it from then on
                await self._note(name, ReplicaState(tenant.instance or "", member, 0.0))
            # with what an earlier copy has left half done, Incus makes no further one
            await self._copies.tidy(name, "" if made is None or self._broken[name] else _snapshot(made.at))
            if self._broken[name] > 1:
                log.warning("the copy of %s on %s cannot be continued: making another one", name, member)
                await self._copies.drop(name)
            before = await self._records.export(name, tenant.instance or "", "")
            copy = await self._copies.take(tenant)
            try:
                after = await self._records.export(name, copy.instance, copy.snapshot)
                await self._copies.send(copy, member)
                # after the disk: whoever has these also has the snapshot that they are of
                text = await asyncio.to_thread(unsure, before, after)  # it may have megabytes
                if (peer := self._cluster.peers.all.get(member)) is None:  # removed meanwhile
                    raise MemberAway(member)
                await self._cluster.send_records(peer, text, _SENDING)
                await self._copies.confirm(copy)
            except GatewayError:
                await self._copies.give_up(copy)
                raise
            await self._note(name, ReplicaState(copy.instance, member, copy.at))
            self._up_to_date(name)
        except NotFound:
            return  # it has just been destroyed
        except GatewayError as error:
            log.warning("cannot make a new copy of %s: %s", name, error.message)
            self._why[name] = error.message
            self._broken[name] += _BROKEN.search(str(error.__cause__)) is not None

    def _up_to_date(self, name: str) -> None:
        self._fresh[name] = time.monotonic(), self._fresh.get(name, (0.0, 0.0))[1]
        self._broken.pop(name, None)
        self._why.pop(name, None)

    async def _is_unchanged(self, name: str, workspace: str, made: ReplicaState) -> bool:
        try:
            return not await self._changed(name, workspace, _snapshot(made.at))
        except NotFound:
            raise
        except GatewayError as error:  # only a part of that snapshot is left
            log.info("cannot compare %s with its copy: %s", name, error.message)
            return False

    async def _place(self, standing: ReplicaState | None) -> str | None:
        """Return the member that has, or will have, the copy; None if no member can have it."""
        peers = self._cluster.peers.all
        if standing is not None and standing.member in peers:
            return standing.member if peers[standing.member].alive else None
        has = Counter(one.member for one in self._standing.values())
        there = [peer.name for peer in peers.values() if peer.alive and peer.told.is_set()]
        for member in sorted(there, key=lambda name: (has[name], name)):
            total, used = await self._copies.space(member)
            if total - used > self._settings.pool_reserve * total:
                return member
        log.warning("no other server has room for copies of tenants")
        return None

    async def _end(self, name: str, tenant: TenantInstance | None) -> None:
        """Delete the copy of a tenant that was destroyed or should have none.

        The copy of one that moved stays.
        """
        if tenant is not None:
            with contextlib.suppress(NotFound):
                await self._copies.forget(name)
        moved = any(name in peer.tenants for peer in self._cluster.peers.all.values())
        if tenant is not None or not moved:
            await self._copies.drop(name)
        await self._note(name, None)

    async def gone(self, tenant: str) -> None:
        """Stop copying a tenant that now belongs, with its copy, to another member."""
        await self._note(tenant, None)

    async def _note(self, name: str, standing: ReplicaState | None) -> None:
        if standing is None:
            self._standing.pop(name, None)
        else:
            self._standing[name] = standing
        try:
            await self._store.write(lambda connection: _put(connection, name, standing))
        except StoreFailed as error:
            log.warning("cannot record the copy of %s: %s", name, error.message)

    async def received(self, tenant: str, snapshot: str) -> None:
        """Note that the copy of another member's tenant on this member has a new snapshot."""
        try:
            await self._copies.count(tenant, snapshot)
        except GatewayError as error:
            log.warning("the disk usage of the copy of %s is not counted: %s", tenant, error.message)

    # --- lost members -------------------------------------------------------------------------------

    @property
    def lost(self) -> Collection[str]:
        """The tenants of removed members whose copies this member has, until they are back."""
        return self._lost.keys()

    def home(self, tenant: str) -> str:
        """Return the removed member that had a lost tenant."""
        return self._lost[tenant].home

    def check(self, tenant: str) -> None:
        """Raise `Unavailable` for a tenant that is lost and not back yet."""
        if (copy := self._lost.get(tenant)) is not None:
            raise Unavailable(
                f"the server of {tenant}, {copy.home}, was removed; it comes back from its copy with: "
                f"incus-gateway cluster recover {tenant}",
                reason="member_away",
                location=copy.home,
                retry_after=_RETRY_AFTER,
            )

    async def follow(self) -> None:
        """Keep `lost` up to date, forever; first start what ran when this server went down."""
        await self._cluster.peers.known()
        await self._cluster.settle()  # by then a removed member knows that it is one
        peers, looked, started = self._cluster.peers, asyncio.Event(), False
        members: Collection[str] | None = None
        peers.watchers.add(looked.set)
        try:
            while not peers.out.is_set():
                looked.clear()
                try:
                    if not started:
                        await self._start_fallen()
                        started = True
                    if members != {self._cluster.own, *peers.present}:
                        members = {self._cluster.own, *peers.present}
                        async with self._recovering:  # else it may find copies that are just being used
                            await self._look_for_lost(members)
                except GatewayError as error:
                    log.warning("cannot look for tenants of removed servers now: %s", error.message)
                    members = None
                    await asyncio.sleep(_AGAIN)
                else:
                    await looked.wait()
        finally:
            peers.watchers.discard(looked.set)

    async def _start_fallen(self) -> None:
        for tenant in await self._copies.fallen():
            try:
                await self._tenants.start(tenant)
            except GatewayError as error:
                log.warning("cannot start %s after its server was down: %s", tenant, error.message)

    async def _look_for_lost(self, members: Collection[str]) -> None:
        before = set(self._lost)
        for copy in await self._copies.here():
            if copy.home in members or copy.tenant in self._over | self._tidying:
                continue
            if copy.tenant not in before:
                if self._names.holder(copy.tenant) == copy.instance:  # an earlier process has begun this
                    await self._revive(await self._latest(copy))
                    continue
                log.warning("%s is lost with its server %s; this one has its copy", copy.tenant, copy.home)
            self._lost[copy.tenant] = await self._latest(copy)
        if before != set(self._lost):
            self._cluster.changed()

    async def _latest(self, copy: Replica) -> Replica:
        """Return a copy as of its records, which come before its home confirms it."""
        known = await self._records.kept(copy.tenant)
        return copy.of(known.id) if known is not None and known.instance == copy.instance else copy

    def questions(self) -> Mapping[str, Question]:
        """Return what peers ask about copies."""

        async def listed(_: Peer, what: Any) -> Any:
            return await self.listed()

        return {COPIES: listed}

    def orders(self) -> Mapping[str, Order]:
        """Return what peers order about copies."""

        async def recover(_: Peer, text: bytes) -> Any:
            recovered, failed = await self.recover([str(tenant) for tenant in orjson.loads(text)["tenants"]])
            return {"recovered": recovered, "failed": failed}

        return {RECOVER: recover}

    async def listed(self) -> Sequence[Mapping[str, Any]]:
        """Return the copies of others' tenants on this member as clients see them. Raises `Unavailable`."""
        members = await self._members()
        copies = [copy for copy in await self._copies.here() if copy.home != self._cluster.own]
        return [self._described(await self._latest(copy), members) for copy in copies]

    def _described(self, copy: Replica, members: Collection[str]) -> Mapping[str, Any]:
        """Return a copy as clients see it; what is lost with its home is what was done since the copy."""
        return {
            "tenant": copy.tenant,
            "home": copy.home,
            "member": self._cluster.own,
            "of": _iso(copy.at),
            "lost_seconds": self._age(copy),
            "lost": copy.home not in members,
        }

    def _age(self, copy: Replica) -> int:
        """Return how old a copy was when its home was last heard, in seconds."""
        heard = self._cluster.peers.heard(copy.home)
        return round(max(0.0, (time.time() if heard is None else heard) - copy.at))

    async def recover(self, tenants: Collection[str]) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
        """Bring back those of these tenants that are lost and have their copy here. Can be repeated.

        Return them, and why others did not come back, by tenant. Raises `Unavailable`.
        """
        async with self._recovering:
            self._cluster.peers.look()
            await self._look_for_lost(members := await self._members())
            few, failed = Admission[str]("recoveries", each=_AT_ONCE), dict[str, str]()

            async def one(copy: Replica) -> Mapping[str, Any] | None:
                async with few.slot(self._cluster.own):
                    try:
                        await self._revive(copy)
                    except GatewayError as error:
                        log.warning("cannot recover %s of %s: %s", copy.tenant, copy.home, error.message)
                        failed[copy.tenant] = error.message
                        return None
                return self._described(copy, members)

            wanted = [copy for name, copy in list(self._lost.items()) if name in tenants]
            done = await asyncio.gather(*map(one, wanted))
        return [one for one in done if one is not None], failed

    async def _revive(self, copy: Replica) -> None:
        """Turn a copy on this member into the tenant. Idempotent. Raises `Conflict` and `Unavailable`."""
        name = copy.tenant
        try:
            await self._copies.revive(copy)
        except Conflict:
            self._over.add(name)
            self._lost.pop(name, None)
            raise
        try:
            await self._records.adopt(name, copy.snapshot)
        except GatewayError as error:
            log.error("cannot recover the records of %s of the lost %s: %s", name, copy.home, error.message)
        try:
            if copy.running:
                async with self._capacity.promise(name):
                    await self._tenants.start(name)
        except GatewayError as error:
            log.warning("the recovered %s is asleep until a visitor comes: %s", name, error.message)
            await self._tenants.mark_asleep(name, True)
        for _ in range(_LOOKS):  # what is told before that is of an earlier tenant of the name
            if self._names.holder(name) == copy.instance:
                break
            await asyncio.sleep(_NOTICED)
        log.warning("recovered %s of the lost %s, as it was at %s", name, copy.home, _iso(copy.at))
        facts = {"from": copy.home, "to": self._cluster.own, "of": _iso(copy.at)}
        self._bus.publish("tenant.recovered", name, {**facts, "lostSeconds": self._age(copy)})
        self._tidying.add(name)
        self._lost.pop(name, None)
        begin(self._tidy(name))  # nobody waits for that: it took ten tenants another ten seconds

    async def _tidy(self, name: str) -> None:
        """Delete the copy that a tenant came back from."""
        try:
            await self._copies.forget(name)
            await self._copies.drop(name)
        except GatewayError as error:
            log.warning("the copy that %s came back from is left: %s", name, error.message)
            self._over.add(name)
        finally:
            self._tidying.discard(name)


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def _snapshot(at: float) -> str:
    return Replica("", "", "", at, False).snapshot


# --- statements, run by the store -----------------------------------------------------------------------


def _all(connection: sqlite3.Connection) -> list[tuple[str, str, str, float]]:
    return connection.execute("SELECT tenant, instance, member, at FROM standby").fetchall()


def _put(connection: sqlite3.Connection, tenant: str, standing: ReplicaState | None) -> None:
    if standing is None:
        connection.execute("DELETE FROM standby WHERE tenant = ?", (tenant,))
    else:
        row = (tenant, standing.instance, standing.member, standing.at)
        connection.execute("INSERT OR REPLACE INTO standby VALUES (?, ?, ?, ?)", row)
