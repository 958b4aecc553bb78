"""Which member is a tenant's home: as the peers report, and as those that are away last reported.

Asks all peers which of them has something, once for all who want to know at the same time.

When a tenant has moved, all calls that waited for it may look for it at once. A question for each of them to
each peer would keep all gateways from everything else.

The room that a member has for new tenants, as its gateway reports it.

What the gateway of a cluster's member shares with the others, built once.

Notices when Incus's database has no majority, so that requests that need it can be refused at once.

Incus itself says so after a minute. One whose leader has just died is as silent for some seconds, and then
answers all that waited: so a silent database counts only where most members' gateways are silent, too.

Ends the wait for a member whose server has died, so that the cluster chooses another leader at once.

One gateway of a cluster: its peers, its listener for them, and which member has which tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import socket
import sqlite3
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import orjson
from starlette.types import ASGIApp

from gateway.cluster.identity import Identity
from gateway.cluster.keys import PATIENCE, IncusKeys, Placements
from gateway.cluster.listener import Listener, Order, Own, Question
from gateway.cluster.peers import Known, MemberAway, Members, Peer, Peers, apply, order
from gateway.cluster.records import MOST
from gateway.cluster.sites import RemoteSites
from gateway.errors import GatewayError, Unavailable
from gateway.incus import Incus, IncusError
from gateway.incus.members import NO_QUORUM, Member, Membership
from gateway.ownership.reservations import Reservations, SharedKeys
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed
from gateway.tasks import begin, run_forever
from gateway.transport.http1 import SecureServer

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


FIND: Final = "find"
"""What a peer is asked by whether it has something."""

Found = tuple[Mapping[str, Any], Sequence[str]]
"""The answers of peers, None for one that has none of it, and the names of those that did not answer."""
_What = tuple[tuple[str, str], ...]


class Search:
    """The questions that are on their way, and those that follow. Used from the event loop only."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._asking: dict[_What, asyncio.Task[Found]] = {}
        self._next: dict[_What, asyncio.Task[Found]] = {}

    async def ask(self, what: Mapping[str, str]) -> Found:
        """Return what the peers say, all of them after this was called."""
        key = tuple(sorted(what.items()))
        if key not in self._next:
            # one that is on its way may have been answered already, as it was before
            self._next[key] = asyncio.create_task(self._ask(key, self._asking.get(key)))
        return await asyncio.shield(self._next[key])  # others wait for it too

    async def _ask(self, key: _What, before: asyncio.Task[Found] | None) -> Found:
        if before is not None:
            await asyncio.wait([before])
        task = self._asking[key] = self._next.pop(key)
        try:
            return await self._peers.ask_all(f"/peer/ask/{FIND}", dict(key))
        finally:
            if self._asking.get(key) is task:
                del self._asking[key]


@dataclass(frozen=True, slots=True)
class Room:
    """`takes` is how many tenants of the usual size its memory suffices for, None if that is not known.

    `running` counts those that run there.
    """

    running: int
    takes: int | None = None

    @classmethod
    def parse(cls, told: object, tenants: Iterable[Known]) -> Room:
        """Parse a peer's report; what an older peer does not report is counted from its `tenants`."""
        match told:
            case {"running": int(running), "takes": int() | None as takes}:
                return cls(running, takes)
        return cls(sum(one.status == "running" for one in tenants))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def used(self, usual: int) -> tuple[bool, float, int]:
        """Return what the member with most room has the least of; `usual` stands for an unknown `takes`.

        It is the share of its memory, so that a larger server gets more, in per cent: less is noise.
        """
        takes = usual if self.takes is None else self.takes
        return takes <= 0, round(self.running / max(1, self.running + takes), 2), self.running


_MEMBER_WAIT: Final = 5.0  # seconds for incusd to say whether it is clustered
_MEMBER: Final = "member"
"""The file in the state dir with the member's name, for a start while incusd does not answer."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What the gateways of a cluster share, as seen by the member `own`."""

    own: str
    members: Callable[[], Awaitable[Collection[str]]]
    """Returns the names of the cluster's members, or raises `Unavailable`."""
    keys: SharedKeys
    domains: Reservations
    placements: Placements
    sites: RemoteSites

    async def follow(self, *look_soon: Callable[[], None]) -> None:
        """Call these once and after each change of the keys, until the connection to Incus breaks.

        Then it raises `Unavailable`.
        """
        async with contextlib.aclosing(self.keys.changes()) as changes:  # type: ignore[type-var]
            async for _ in changes:
                for look in look_soon:
                    look()


@contextlib.asynccontextmanager
async def sharing(own: str, alive: Callable[[str], bool], settings: Settings) -> AsyncIterator[Sharing]:
    """Open what this member's gateway shares with the others; `alive` says which of them are reachable."""
    async with Incus(settings.incus_socket, settings.cluster_project, PATIENCE) as incus:
        membership = Membership(incus)

        async def members() -> Sequence[Member]:
            try:
                async with asyncio.timeout(PATIENCE):
                    return await membership.members()
            except (IncusError, TimeoutError) as error:
                raise Unavailable(
                    "cannot list the members of the cluster now; try again soon", reason=NO_QUORUM
                ) from error

        async def names() -> Collection[str]:
            return {member.name for member in await members()}

        async with IncusKeys(incus) as keys:
            yield Sharing(
                own=own,
                members=names,
                keys=keys,
                domains=Reservations(keys, "domain", own, names),
                placements=Placements(keys, names),
                sites=RemoteSites(own, members, settings.caddy_peers, alive),
            )


async def own_member(incus: Incus, state_dir: Path) -> str:
    """Return the name of this server's member, "" without a cluster; the last one known if incusd is down."""
    noted = state_dir / _MEMBER
    try:
        async with asyncio.timeout(_MEMBER_WAIT):
            own = await incus.member()
    except (IncusError, TimeoutError):
        log.warning("incusd does not answer: assuming the cluster membership of the last start")
        return await asyncio.to_thread(_noted, noted)
    await asyncio.to_thread(_note, noted, own)
    return own


def _noted(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _note(path: Path, own: str) -> None:
    if own:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(f"{own}\n")
    else:
        path.unlink(missing_ok=True)


_QUORUM_LOOK: Final = 0.5  # seconds


class Quorum:
    """Calls `tell` with whether the cluster can decide, whenever that changes.

    `ask` queries the database, and raises `Unavailable` soon if it does not answer.
    """

    def __init__(
        self, peers: Peers, ask: Callable[[], Awaitable[object]], tell: Callable[[bool], None]
    ) -> None:
        self._peers, self._ask, self._tell = peers, ask, tell
        self._there = True

    async def follow(self) -> None:
        """Check, forever."""
        while True:
            await self.look()
            await asyncio.sleep(_QUORUM_LOOK)

    async def look(self) -> None:
        """Check once."""
        there = not self._is_doubtful() or await self._answers()
        if there != self._there:
            self._there = there
            log.warning("the cluster decides again" if there else "the cluster has no quorum")
            self._tell(there)

    def _is_doubtful(self) -> bool:
        peers = self._peers.all.values()
        return 2 * (1 + sum(peer.alive for peer in peers)) <= 1 + len(peers)

    async def _answers(self) -> bool:
        try:
            await self._ask()
        except Unavailable:
            return False
        return True


# seconds in which the kernel of a server that lives answers, however busy that is; a packet that is lost is
# sent again after one
_PROBE_ANSWERING: Final = 1.2
_SYN_SENT: Final = 2  # linux/tcp_states.h
_PROBE_LOOK: Final = 0.1  # seconds between two looks whether it has
_PROBE_PAUSES: Final = (0.25, 10.0)  # seconds between two looks: while others elect a leader, and later
_ELECTING: Final = 30.0  # seconds; the kernel gives the connections up by itself after as many

CutOff = Callable[[str], Awaitable[int]]
"""Closes this host's connections with the Incus at HOST:PORT; returns how many."""


class DeadPeers:
    """Checks the servers of silent peers, and has the connections to dead ones cut.

    A silent gateway may just be down, on a server that lives. So the server is asked for a connection: one
    that refuses it is alive, and only one that answers nothing at all counts as dead.
    """

    def __init__(self, peers: Peers, cut_off: CutOff) -> None:
        self._peers, self._cut_off = peers, cut_off
        self._silent = asyncio.Event()
        self._told: set[str] = set()  # dead members of which the log has said so

    async def follow(self) -> None:
        """Check the servers whenever a peer falls silent. Runs forever."""
        self._peers.silent = self._silent.set
        self._silent.set()  # by those that died before
        while True:
            await self._silent.wait()
            self._silent.clear()
            await self._look_on()

    async def _look_on(self) -> None:
        """Check until all peers are reachable again."""
        loop = asyncio.get_running_loop()
        eager = loop.time() + _ELECTING
        while silent := [peer for peer in self._peers.all.values() if not peer.alive and peer.incus]:
            await asyncio.gather(*map(self._look, silent))
            pause, rare = _PROBE_PAUSES
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause if loop.time() < eager else rare):
                    await self._silent.wait()
                    eager = loop.time() + _ELECTING  # another one
            self._silent.clear()
            self._told &= {peer.name for peer in silent}

    async def _look(self, peer: Peer) -> None:
        if await answers(peer.incus):
            self._told.discard(peer.name)
            return
        try:
            ended = await self._cut_off(peer.incus)
        except GatewayError as error:
            log.warning("cannot close Incus's connections to %s, which is dead: %s", peer.name, error.message)
        else:
            # Incus calls it again and again
            log.log(
                logging.DEBUG if peer.name in self._told else logging.WARNING,
                *("%s is dead: closed %d connections of Incus to it", peer.name, ended),
            )
            self._told.add(peer.name)


async def answers(address: str) -> bool:
    """Return whether a server answers a connection attempt at all, even by refusing it.

    The kernel is asked for that, and only after the time: this process may have no CPU meanwhile.
    """
    host, _, port = address.rpartition(":")
    try:
        place = ip_address(host.strip("[]"))
    except ValueError:
        return True  # a name, which nobody here may wait for
    family = socket.AF_INET if place.version == 4 else socket.AF_INET6
    loop = asyncio.get_running_loop()
    until = loop.time() + _PROBE_ANSWERING
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        error = probe.connect_ex((str(place), int(port)))
        while error in (0, errno.EINPROGRESS):
            if probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _SYN_SENT:
                return True
            if loop.time() > until:
                return False
            await asyncio.sleep(_PROBE_LOOK)
            error = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return error == errno.ECONNREFUSED


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
        listener = Listener(self.peers, tell, app, MOST)

        async def find(_: Peer, what: Mapping[str, Any]) -> Any:
            return {} if await has(what) else None

        listener.questions |= {**questions, FIND: find}
        listener.orders |= orders
        listener.uploads |= uploads
        self._server = SecureServer(
            listener,
            self.peers.accepting,
            lambda shown: self.peers.of(shown) is not None or self.peers.was_known(shown),
        )
        jobs = {
            "the list of this member's tenants": tell.look,
            "the record of peers' tenants": self.homes.write,
            "the listener for peers": self._listen,
        }
        tasks = [begin(run_forever(name, work)) for name, work in jobs.items()]
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
