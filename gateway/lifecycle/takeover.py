"""Brings back the tenants of a member that has died, and informs that member when it returns.

```
where a copy is   silence ── suspicion ── its lease is over, GATEWAY_FAILOVER too ── decision ── tenant
at the old home   no lease ── frozen ── … back: suspicion ── decision about each tenant ── deleted, or thawed
```

The decision about a tenant is a key of the cluster, and whoever comes first makes it: see `Placements.after`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from gateway.cluster.cluster import Cluster
from gateway.cluster.lease import Lease, now
from gateway.cluster.peers import Peer
from gateway.cluster.placements import Placements
from gateway.cluster.records import Records
from gateway.errors import Conflict, GatewayError, Unavailable
from gateway.lifecycle.standby import Standby
from gateway.ownership.names import Names
from gateway.runtime import Tenants
from gateway.runtime.incus.moves import Moves
from gateway.runtime.incus.standby_copies import StandbyCopies, StandbyCopy
from gateway.settings import Settings
from gateway.settings.clustering import MARGIN

log = logging.getLogger(__name__)

_LOOK: Final = 0.5  # seconds between two looks at a member that is silent
_AGAIN: Final = 10.0  # seconds until the copies that are here are listed again
_ACTING: Final = 2.0  # seconds that a member has from the end of its lease until its tenants stand still
_LEFT: Final = 60.0  # seconds until what could not be deleted is tried again
_FILE: Final = "left-tenants"
"""In the state dir: what `Return` could not delete yet, as JSON, for the process that comes after."""
_ONLINE: Final = "Online"


@dataclass(slots=True)
class _Lost:
    """What is known about a silent member: the current suspicion, and since when we have known of it."""

    suspicion: str = ""
    since: float = 0.0
    told: bool = False


class Takeover:
    """Brings back tenants whose copies this member has.

    `answers` says whether the server at HOST:PORT answers anything at all, and `statuses` returns Incus's
    word of each member, or raises `Unavailable`.
    """

    def __init__(
        self,
        cluster: Cluster,
        lease: Lease,
        placements: Placements,
        copies: StandbyCopies,
        standby: Standby,
        answers: Callable[[str], Awaitable[bool]],
        statuses: Callable[[], Awaitable[Mapping[str, str]]],
        settings: Settings,
    ) -> None:
        self._cluster, self._lease, self._placements = cluster, lease, placements
        self._copies, self._standby, self._settings = copies, standby, settings
        self._answers, self._statuses = answers, statuses
        self._lost: dict[str, _Lost] = {}
        self._here: list[StandbyCopy] = []
        self._listed = -math.inf
        self._taken: dict[str, StandbyCopy] = {}  # those that are decided to be ours, and not there yet
        self._recalled = False
        self._reviving = asyncio.Lock()
        self._said: dict[str, str] = {}  # why the tenants of whom are not brought back yet

    async def follow(self) -> None:
        """Handle silent members, forever."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK)

    async def look(self) -> None:
        """Do what is due now for the tenants of silent members."""
        self._lost = {name: lost for name, lost in self._lost.items() if name in self._cluster.peers.all}
        silent = [peer for peer in self._cluster.peers.all.values() if not peer.alive]
        works = {peer.name: self._look(peer) for peer in silent}
        works |= {name: self._clear(name) for name in self._lost if self._cluster.alive(name)}
        works["an earlier process"] = self._go_on()
        ended = await asyncio.gather(*works.values(), return_exceptions=True)
        for name, error in zip(works, ended, strict=True):
            if isinstance(error, GatewayError):
                if self._said.get(name) != error.message:
                    log.warning("cannot recover the tenants of %s yet: %s", name, error.message)
                self._said[name] = error.message
            elif isinstance(error, BaseException):
                raise error
            else:
                self._said.pop(name, None)

    async def _go_on(self) -> None:
        """Finish bringing back tenants for which the decision was made, here or in an earlier process."""
        async with self._reviving:
            if not self._recalled:
                if others := [copy for copy in await self._copied() if copy.home != self._cluster.own]:
                    taken = await self._placements.taken(self._cluster.own)
                    self._taken |= {copy.tenant: copy for copy in others if copy.tenant in taken}
                self._recalled = True
            for tenant, copy in list(self._taken.items()):
                await self._standby.revive(copy, away=True)
                del self._taken[tenant]
                self._listed = -math.inf

    async def _clear(self, name: str) -> None:
        """Forget that a member was silent, once it has found out which tenants it still has."""
        if not self._lost[name].suspicion or await self._lease.suspicion(name) is None:
            del self._lost[name]

    async def _look(self, peer: Peer) -> None:
        """Do what is due for the tenants of a silent member."""
        if not any(copy.home == peer.name for copy in await self._copied()):
            return
        lost = self._lost.setdefault(peer.name, _Lost())
        silence = await self._lease.silence(peer.name)
        if silence.lease is None:
            if not lost.told:
                log.warning("%s is silent, and has no lease: its tenants wait for it", peer.name)
                lost.told = True
            return
        patience = max(self._settings.failover, silence.lease + MARGIN)
        if silence.seconds < patience - silence.lease - MARGIN or await self._answers(peer.incus):
            return
        suspicion = await self._lease.suspect(peer.name, secrets.token_hex(8))
        if suspicion != lost.suspicion:
            lost.suspicion, lost.since = suspicion, now()
            log.warning("%s is suspected of being lost, after %.0f s of silence", peer.name, silence.seconds)
        if silence.seconds < patience or now() - lost.since < silence.lease + _ACTING:
            return
        if (await self._statuses()).get(peer.name, _ONLINE) == _ONLINE:
            return
        self._listed = -math.inf  # its last copies may have come since
        for copy in await self._copied():
            if copy.home == peer.name:
                await self._take(peer, copy, suspicion, patience)

    async def _take(self, peer: Peer, copy: StandbyCopy, suspicion: str, patience: float) -> None:
        """Decide that a tenant is this member's, and bring it back."""
        # it may have come back while another tenant was brought back
        if (await self._lease.silence(peer.name)).seconds < patience:
            return
        if await self._lease.suspicion(peer.name) != suspicion:
            return
        own = self._cluster.own
        if await self._placements.after(copy.tenant, peer.name, own, suspicion) == own:
            log.warning("%s is lost: recovering %s here", peer.name, copy.tenant)
            self._taken[copy.tenant] = copy
            await self._go_on()

    async def _copied(self) -> list[StandbyCopy]:
        if now() - self._listed > _AGAIN:
            self._here = [*await self._copies.here()]
            self._listed = now()
        return self._here


class Return:
    """When this member comes back, keeps the tenants that are still its own and gives up the rest.

    `leaving` are tenants that the runtime is to leave alone, `changed` is called with a tenant that is
    another member's now.
    """

    def __init__(
        self,
        own: str,
        placements: Placements,
        standby: Standby,
        copies: StandbyCopies,
        tenants: Tenants,
        names: Names,
        records: Records,
        steps: Moves,
        leaving: set[str],
        changed: Callable[[str], None],
        state_dir: Path,
    ) -> None:
        self._own, self._placements, self._standby, self._copies = own, placements, standby, copies
        self._tenants, self._names, self._records = tenants, names, records
        self._steps, self._leaving, self._changed = steps, leaving, changed
        self._file = state_dir / _FILE
        # of tenants that are another member's: instance, home and suspicion
        self._left: dict[str, list[str]] = _read(self._file)
        leaving.update(self._left)
        names.moving.update(self._left)

    @property
    def left(self) -> Collection[str]:
        """Other members' tenants of which something could not be deleted here yet: they must not run."""
        return self._left.keys()

    async def follow(self) -> None:
        """Try again to delete what is left of other members' tenants. Runs forever."""
        while True:
            await asyncio.sleep(_LEFT)
            for tenant, (instance, home, suspicion) in list(self._left.items()):
                await self._give_up(tenant, instance, home, suspicion)

    async def accused(self, suspicion: str) -> None:
        """Find out which member each tenant with a copy elsewhere belongs to. Can be repeated.

        Raises `GatewayError` if that is not known yet.
        """
        # the records of this member may be lost, and what its instances say may be older than these
        tenants = {tenant: self._standby.instance(tenant) for tenant in self._standby.copied}
        for tenant, instance in {**tenants, **await self._copies.held()}.items():
            home = await self._placements.after(tenant, self._own, self._own, suspicion)
            if home != self._own:
                await self._give_up(tenant, instance, home, suspicion)

    async def _give_up(self, tenant: str, instance: str, home: str, suspicion: str) -> None:
        """Delete a tenant here. If that fails this member's own tenants do not wait for it."""
        self._left[tenant] = [instance, home, suspicion]
        await self._remember()  # before the suspicion is withdrawn: the next process must not thaw it
        try:
            await self._let_go(tenant, instance, home, suspicion)
        except GatewayError as error:
            log.error("what is left of %s, which %s has, stays frozen here: %s", tenant, home, error.message)
        else:
            del self._left[tenant]
            await self._remember()

    async def _remember(self) -> None:
        try:
            await asyncio.to_thread(_write, self._file, self._left)
        except OSError as error:
            raise Unavailable(f"cannot record what is left of other members' tenants: {error}") from error

    async def _let_go(self, tenant: str, instance: str, home: str, suspicion: str) -> None:
        """Delete what this member still has of a tenant that runs elsewhere. The loss is reported there."""
        log.warning("%s was recovered by %s: deleting what is left of it here", tenant, home)
        for tenants in (self._leaving, self._names.moving):
            tenants.add(tenant)
        try:
            move = hashlib.sha256(f"{suspicion} {tenant}".encode()).hexdigest()[:16]
            with contextlib.suppress(Conflict):  # another tenant has its name by now
                await self._steps.give_up(tenant, instance, move)
            await self._names.leave(tenant)
            await self._records.leave(tenant)
            await self._standby.gone(tenant)
        except GatewayError:
            raise  # the runtime leaves it alone until it is gone
        except BaseException:
            self._unmark(tenant)
            raise
        self._unmark(tenant)
        self._changed(tenant)
        await self._placements.back(tenant, home, suspicion)

    def _unmark(self, tenant: str) -> None:
        for tenants in (self._leaving, self._names.moving):
            tenants.discard(tenant)

    async def start(self) -> None:
        """Start the tenants that were running when this server went down. Incus leaves this to us."""
        for tenant in await self._copies.fallen():
            if tenant in self._left:
                continue
            try:
                await self._tenants.start(tenant)
            except GatewayError as error:
                log.warning("cannot start %s after its server was down: %s", tenant, error.message)


def _read(file: Path) -> dict[str, list[str]]:
    try:
        return dict(orjson.loads(file.read_bytes()))
    except (OSError, ValueError):
        return {}


def _write(file: Path, left: Mapping[str, list[str]]) -> None:
    if left:
        new = file.with_suffix(".new")
        new.write_bytes(orjson.dumps(left))
        new.replace(file)
    else:
        file.unlink(missing_ok=True)
