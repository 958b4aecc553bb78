"""Which member is a tenant's home: as the peers report, and as those that are away last reported."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from typing import Final

import orjson

from gateway.cluster.known import Known, apply
from gateway.cluster.peers import Peer, Peers
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)

_TOGETHER: Final = 1.0  # seconds in which changes are written together


class Homes:
    """The tenants of all peers. What was known survives this process: a member that is away stays known."""

    def __init__(self, peers: Peers, store: Store) -> None:
        self.peers = peers
        self._store = store
        self._dirty: set[str] = set()
        self._changed = asyncio.Event()
        self._told = asyncio.Event()

    async def recall(self) -> None:
        """Load what an earlier process knew about peers that have not reported to this one yet."""
        for member, tenants in await self._store.read(_all):
            peer = self.peers.all.setdefault(member, Peer(member))
            if peer.told.is_set():
                continue
            try:
                apply(orjson.loads(tenants), peer.tenants)
            except ValueError:
                log.warning("cannot read the recorded tenants of %s", member)
        self.peers.changed = self.changed

    def changed(self, peer: Peer) -> None:
        """Note that a peer's tenants have changed."""
        self._dirty.add(peer.name)
        self._changed.set()
        self._told.set()
        self._told = asyncio.Event()

    async def next(self) -> None:
        """Wait until a peer next reports its tenants."""
        await self._told.wait()

    async def write(self) -> None:
        """Store what must survive this process. Runs forever."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await asyncio.sleep(_TOGETHER)
            for member in list(self._dirty):
                self._dirty.discard(member)
                peer = self.peers.all.get(member)
                tenants = {} if peer is None else peer.tenants
                told = orjson.dumps({"tenants": [known.to_dict() for known in tenants.values()]})
                try:
                    await self._store.write(lambda database: _put(database, member, told))  # noqa: B023
                except StoreFailed as error:
                    log.warning("cannot record the tenants of %s: %s", member, error.message)
                    self._dirty.add(member)

    def home(self, tenant: str) -> Peer | None:
        """Return the peer that has a tenant, None if none is known to. A reachable peer takes precedence."""
        found = [peer for peer in self.peers.all.values() if tenant in peer.tenants]
        return max(found, key=lambda peer: peer.alive, default=None)

    def at(self, domain: str) -> tuple[Peer, Known] | None:
        """Return the tenant that serves a domain at a peer, and that peer."""
        found = ((p, known) for p in self.peers.all.values() for known in p.tenants.values())
        return next(((peer, known) for peer, known in found if known.domain == domain), None)

    def unheard(self, silent: Collection[str]) -> Iterator[tuple[Peer, Known]]:
        """Yield the tenants of peers that are away or `silent`, unless another peer has them by now."""
        for peer in self.peers.all.values():
            if not peer.alive or peer.name in silent:
                for known in peer.tenants.values():
                    if self.home(known.name) is peer:
                        yield peer, known

    def all(self) -> Mapping[str, str]:
        """Return the member of each tenant that a peer has."""
        return {name: peer.name for peer in self.peers.all.values() for name in peer.tenants}


def _all(database: sqlite3.Connection) -> list[tuple[str, bytes]]:
    return database.execute("SELECT member, tenants FROM peers").fetchall()


def _put(database: sqlite3.Connection, member: str, tenants: bytes) -> None:
    database.execute("INSERT OR REPLACE INTO peers VALUES (?, ?)", (member, tenants))
