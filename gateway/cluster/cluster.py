"""One gateway of a cluster: its peers, its listener for them, and which member has which tenant."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from starlette.types import ASGIApp

from gateway.cluster.homes import Homes
from gateway.cluster.identity import Identity
from gateway.cluster.known import Known
from gateway.cluster.listener import Listener, Order, Question
from gateway.cluster.orders import order
from gateway.cluster.own import Own
from gateway.cluster.peers import MemberAway, Members, Peer, Peers
from gateway.cluster.placements import Placements
from gateway.cluster.room import Room
from gateway.cluster.search import FIND, Search
from gateway.errors import Unavailable
from gateway.settings import Settings
from gateway.storage.store import Store
from gateway.tasks import begin, lasting
from gateway.transport.http1 import SecureServer

log = logging.getLogger(__name__)

ASK_SECRET: Final = "secret"  # noqa: S105 - the question's name
"""What a peer is asked for its secret by."""
TELL_REVOKED: Final = "revoked"
"""What a peer is told of a revoked token by."""
ASK_ROOM: Final = "room"
"""What a peer is asked by for the room that it has for new tenants; see `Room`."""
PUT_RECORDS: Final = "records"
"""What a tenant's records are sent by to a peer, which keeps them; see `Records`."""
SETTLING: Final = 3.0
"""Seconds in which peers tell their tenants at the start; longer than a peer may be silent."""
_BINDING: Final = 0.05  # seconds between two attempts, where the process before still has the port
_FETCHING: Final = 30.0  # seconds in which peers learn our certificate and give their secret
_ROOMS: Final = 1.0  # seconds for which the room of members is taken for what it was
_FETCH: Final = 0.5  # seconds between two attempts


class Cluster:
    """This member's gateway among its peers. Create it with `joined`; `open` lets the peers connect."""

    def __init__(self, own: str, peers: Peers, settings: Settings) -> None:
        self.own = own
        self.peers = peers
        self.homes: Homes
        self._tenants: Own | None = None
        self._settled = False
        self._settings = settings
        self._server: SecureServer | None = None
        self._search = Search(peers)
        self._rooms: Mapping[str, Any] = {}
        self._asked = -math.inf  # when, by the loop's clock
        self.placements: Placements | None = None
        """Chooses a new tenant's home among all gateways; without it each chooses by itself."""

    @contextlib.asynccontextmanager
    async def open(
        self,
        app: ASGIApp,
        store: Store,
        tenants: Callable[[], Awaitable[Iterable[Known]]],
        has: Callable[[Mapping[str, Any]], Awaitable[bool]],
        facts: Mapping[str, Any],
        questions: Mapping[str, Question],
        orders: Mapping[str, Order] = MappingProxyType({}),
        uploads: Mapping[str, Order] = MappingProxyType({}),
    ) -> AsyncIterator[None]:
        """Report our tenants to peers, and have `app` answer the requests that they pass on.

        `has` says whether we have what a peer looks for. `facts` are sent along with the tenants.
        `questions`, `orders` and `uploads` are what else peers may request, by name; see `Listener`.
        """
        self.homes = Homes(self.peers, store)
        await self.homes.recall()
        self._tenants = tell = Own(tenants, {"member": self.own, **facts})
        listener = Listener(self.peers, tell, app, self._settings.records_most)

        async def find(_: Peer, what: Mapping[str, Any]) -> Any:
            return {} if await has(what) else None

        listener.questions |= {**questions, FIND: find}
        listener.orders |= orders
        listener.uploads |= uploads
        self._server = SecureServer(
            listener,
            self._settings,
            self.peers.accepting,
            lambda shown: self.peers.of(shown) is not None or self.peers.was_known(shown),
        )
        jobs = {
            "the list of this member's tenants": tell.look,
            "the record of peers' tenants": self.homes.write,
            "the listener for peers": self._listen,
        }
        tasks = [begin(lasting(name, work)) for name, work in jobs.items()]
        try:
            yield
        finally:
            await self._server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self) -> None:
        """Return once each peer has told its tenants, after `SETTLING` seconds in any case.

        This is waited for once: by a process that takes over before the other one lets go, so that no client
        waits for a peer that is away.
        """
        if not self._settled:
            await self.peers.settle(SETTLING)
        self._settled = True

    def changed(self) -> None:
        """Check our tenants again: one of them has changed."""
        if self._tenants is not None:
            self._tenants.changed()

    def refuse(self) -> None:
        """Accept no more connections or requests of peers: another process takes the next ones."""
        if self._tenants is not None:
            self._tenants.end()
        if self._server is not None:
            self._server.refuse()

    async def _listen(self) -> None:
        """Listen where the settings or the cluster say, and publish that."""
        assert self._server is not None
        await self.peers.known()
        await self.settle()
        host, port = self._place()
        if not host:
            raise OSError("the address of this member is not known yet; set GATEWAY_PEER_LISTEN")
        told = False
        while True:
            try:
                found, number = await self._server.listen(host, port)
                break
            except OSError as error:
                if not told:
                    log.info("cannot listen for peers yet: %s", error.strerror)
                told = True
                await asyncio.sleep(_BINDING)
        self.peers.publish(_address(found, number))

    def _place(self) -> tuple[str, int]:
        """Return host and port at which peers reach us; the host is "" while it is not known."""
        host, _, port = self._settings.peer_listen.rpartition(":")
        return host.strip("[]") or self.peers.host or "", int(port)

    # --- what all gateways have in common -----------------------------------------------------------

    async def fetch_secret(self) -> str | None:
        """Ask peers for the secret that signs tokens, before we listen ourselves; None if no peer has it."""
        await self.peers.settle(SETTLING)
        host, port = self._place()
        if host:
            self.peers.publish(_address(host, port))  # so that peers know our certificate
        loop = asyncio.get_running_loop()
        until = loop.time() + _FETCHING
        while loop.time() < until:
            found, _ = await self.peers.ask_all(f"/peer/ask/{ASK_SECRET}", {})
            for answer in found.values():
                if isinstance(answer, dict) and isinstance(answer.get("secret"), str):
                    return str(answer["secret"])
            await asyncio.sleep(_FETCH)
        return None

    async def tell_revoked(self, token: str, expires: float) -> tuple[int, Sequence[str]]:
        """Tell all peers of a revoked token by its id and `exp`.

        Return how many websockets they closed, and which peers did not hear it.
        """
        until = None if expires == math.inf else expires
        what = {"id": token, "expires": until}
        found, silent = await self.peers.ask_all(f"/peer/ask/{TELL_REVOKED}", what)
        closed = (answer.get("closed", 0) for answer in found.values() if isinstance(answer, dict))
        return sum(count for count in closed if isinstance(count, int)), silent

    async def send_records(self, peer: Peer, text: bytes, patience: float) -> None:
        """Make a peer keep what `Records.export` returned. Raises `OrderRefused` and `MemberAway`."""
        await order(self.peers, peer, f"/peer/put/{PUT_RECORDS}", text, patience)

    async def rooms(self) -> Mapping[str, Room]:
        """Return the room of each reachable peer that accepts new tenants, as last reported."""
        now = asyncio.get_running_loop().time()
        if now - self._asked > _ROOMS:
            found, _ = await self.peers.ask_all(f"/peer/ask/{ASK_ROOM}", {})
            self._rooms, self._asked = found, now
        there = [one for one in self.peers.all.values() if one.told.is_set() and not one.drained]
        return {peer.name: Room.parse(self._rooms.get(peer.name), peer.tenants.values()) for peer in there}

    def instance_of(self, tenant: str) -> str | None:
        """Return the instance of this name on another member, None if no member is known to have one."""
        peer = self.homes.home(tenant)
        return None if peer is None else peer.tenants[tenant].instance

    def alive(self, member: str) -> bool:
        """Return whether a member's gateway is reachable."""
        return member == self.own or (member in self.peers.all and self.peers.all[member].alive)

    # --- where a tenant is --------------------------------------------------------------------------

    async def place(self, tenant: str, member: str) -> str:
        """Return the member for a new tenant: the one chosen earlier, or else the wanted one.

        Raises `Unavailable` if the cluster cannot decide, and `MemberAway`.
        """
        chosen = member if self.placements is None else await self.placements.choose(tenant, member)
        if chosen != self.own and chosen not in self.peers.all:
            raise MemberAway(chosen)
        return chosen

    async def find(self, **what: str) -> Peer | None:
        """Ask all reachable peers; return the one that has a tenant or a deployment, None if none has."""
        return (await self._look_for(what))[0]

    async def find_moved(self, **what: str) -> Peer | None:
        """Like `find`, for what a peer had a moment ago. Raises `Unavailable` if a peer does not answer."""
        peer, silent = await self._look_for(what)
        if peer is None and silent:
            raise Unavailable(
                "it has just moved, and some members do not answer; try again",
                reason="moved",
                retry_after=1,
            )
        return peer

    async def _look_for(self, what: Mapping[str, str]) -> tuple[Peer | None, Sequence[str]]:
        found, silent = await self._search.ask(what)
        names = [name for name, answer in found.items() if answer is not None]
        return (self.peers.all.get(names[0]) if names else None), silent


@contextlib.asynccontextmanager
async def joined(own: str, members: Members, settings: Settings) -> AsyncIterator[Cluster]:
    """Follow the peers of a member of this name."""
    identity = await asyncio.to_thread(Identity, settings.state_dir)
    async with Peers(own, members, identity) as peers:
        yield Cluster(own, peers, settings)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
