"""The topology of a cluster: requests for another member's tenants are passed on to the tenants' home.

A request without a valid token for the tenant is never looked up, so its answer reveals nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from prometheus_client.core import GaugeMetricFamily
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from gateway import __version__, protocol
from gateway.api import http
from gateway.api.access import check_covered, check_origin, raw_token
from gateway.api.connection import close_code
from gateway.api.http import REQUEST_ID, USES, address, ask, hold, problem, shutting_down
from gateway.api.routes.websocket import refuse
from gateway.api.services import OtherAnswers, Services, Subject, Topology, services
from gateway.auth.grants import Revocations
from gateway.auth.tokens import Token
from gateway.caddy import Caddy
from gateway.cluster.cluster import (
    ASK_ROOM,
    ASK_SECRET,
    PUT_RECORDS,
    TELL_REVOKED,
    Cluster,
    DeadPeers,
    Quorum,
    Room,
    Sharing,
    joined,
    own_member,
    sharing,
)
from gateway.cluster.events import AHEAD, MergedEvents, PeerStream
from gateway.cluster.identity import common_secret
from gateway.cluster.keys import FolderKeys, FolderMembers, Placements, Revoking
from gateway.cluster.listener import FROM, Order, Question
from gateway.cluster.moves import Arrivals, Departures, MoveLog, Mover, Uses
from gateway.cluster.peers import Known, MemberAway, Peer, RemovedFromCluster
from gateway.cluster.records import Records
from gateway.cluster.relay import NOT_HOME, PART, Body, NotHome, ask_same, client_of, dial, relay
from gateway.cluster.sites import MemberRoutes
from gateway.cluster.standby import Standby
from gateway.errors import GatewayError, NotFound, RateLimited, Unauthorized, Unavailable
from gateway.events import Filter, positions, sse
from gateway.hostnames import Misdirected
from gateway.incus.members import Membership
from gateway.lifecycle.lifecycle import described
from gateway.ownership.domains import Domains
from gateway.ownership.reservations import Keys
from gateway.protocol import CloseCode
from gateway.rootfs.broker_client import DeadMemberCutter
from gateway.runtime import TENANT_NAME, OnAnotherServer, TenantInstance
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.incus.standby_copies import Replicas
from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from gateway.storage.store import Store
from gateway.transport.tunnel import (
    ClientEnd,
    FirstMessage,
    HandshakeRefused,
    ServerEnd,
    close_frame,
    text_frame,
)
from gateway.transport.websocket import TAKE

log = logging.getLogger(__name__)

_LASTING: Final = ("/events", "/logs", "/ws", "/mcp")  # paths of what stays open
_OUTSIDE: Final = ("/healthz", "/metrics")  # what a removed server still answers
_WINDOW: Final = 512 << 10  # bytes that are on their way through here, of one request and its answer
_RETRY_MS: Final = 50  # milliseconds until clients of a tenant that moves may reconnect, and wait


@contextlib.asynccontextmanager
async def opened(
    settings: Settings, runtime: IncusRuntime | LocalRuntime
) -> AsyncIterator[ClusterTopology | None]:
    """Follow the other members of this server's cluster; None if it is in none."""
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        if isinstance(runtime, LocalRuntime):
            if (file := settings.local_member) is None:
                yield None
                return
            folder = FolderMembers(file)
            cluster = await enter(joined(file.name, folder, settings))
            keys = FolderKeys(file.with_name("shared.keys"))
            cluster.placements = Placements(keys, folder.names)
            yield ClusterTopology(cluster, keys, settings)
            return
        if not (own := await own_member(runtime.incus, settings.state_dir)):
            yield None
            return
        cluster = await enter(joined(own, Membership(runtime.incus), settings))
        shared = await enter(sharing(own, cluster.alive, settings))
        cluster.placements = shared.placements
        cutter = DeadMemberCutter(settings)
        stack.push_async_callback(cutter.aclose)
        yield ClusterTopology(
            cluster, shared.keys, settings, shared, DeadPeers(cluster.peers, cutter.cut_off)
        )


class ClusterTopology(Topology):
    """The members of a cluster. `shared` and `dead_peers` are None on the local runtime."""

    services: Services

    def __init__(
        self,
        cluster: Cluster,
        keys: Keys,
        settings: Settings,
        shared: Sharing | None = None,
        dead_peers: DeadPeers | None = None,
    ) -> None:
        self.cluster = cluster
        self.member = cluster.own
        self.home = {"member": cluster.own, "url": settings.advertise}
        self.domains = None if shared is None else shared.domains
        self.tunnels: set[ClientEnd] = set()
        """Websockets of other members' tenants."""
        self.standby: Standby | None = None
        self.departures: Departures | None = None
        self._arrivals: Arrivals | None = None
        self._keys, self._shared, self._dead_peers = keys, shared, dead_peers

    # --- what all members have in common --------------------------------------------------------------

    async def settle(self) -> None:
        await self.cluster.settle()

    async def secret(self, settings: Settings) -> str:
        if self._shared is None:
            return await super().secret(settings)
        configured = None if settings.secret is None else settings.secret.get_secret_value()
        fetch = self.cluster.fetch_secret
        return await common_secret(self._shared.keys, configured, settings.state_dir, fetch)

    async def share_revocations(self, revocations: Revocations, end: Callable[[str], int]) -> None:
        self._revoking = Revoking(revocations, self._keys, end, self.cluster.tell_revoked)
        with contextlib.suppress(GatewayError):  # otherwise it follows when the cluster can be asked
            await self._revoking.agree()

    async def revoke(self, token: str) -> Mapping[str, Any]:
        spread = await self._revoking.spread(token)
        return {"closed": spread.closed, "recorded": spread.recorded, "unheard": sorted(spread.unheard)}

    async def share_sites(self, caddy: Caddy, secret: str) -> None:
        if self._shared is None:
            caddy.leave()
            return
        await self._shared.sites.look()
        if self._shared.sites.own is not None:  # otherwise it is as the last process left it
            await asyncio.to_thread(caddy.join, self._shared.sites.own, secret)

    def remote_routes(self, caddy: Caddy, domains: Domains) -> MemberRoutes | None:
        return None if self._shared is None else MemberRoutes(caddy, domains, self._shared.sites)

    # --- this gateway's services ----------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def attached(self, services: Services, store: Store) -> AsyncIterator[None]:
        self.services = services
        recall = (services.idempotency.recall, services.toolbox.sessions.recall, services.history.recall)
        self._records = Records(store, self.member, recall)
        services.metrics.registry.register(self)
        async with contextlib.AsyncExitStack() as stack:
            if isinstance(services.runtime, IncusRuntime) and self._shared is not None:
                self.cluster.peers.moved = services.deployments.look_soon
                copies = await stack.enter_async_context(Replicas(services.settings, services.runtime))
                self.standby = self._copying(copies, services.runtime, self._shared, store)
                services.doors.check = self.standby.check
                await self._open_moves(services.runtime, self._shared, store)
                stack.push_async_callback(self.hand_over)
            yield

    def _copying(self, copies: Replicas, runtime: IncusRuntime, shared: Sharing, store: Store) -> Standby:
        services = self.services
        return Standby(
            *(copies, runtime.tenants, self.cluster, shared.members, services.capacity, services.names),
            *(self._records, store, services.bus, services.settings),
            changed=services.workers.broker.changed,
            moving=lambda tenant: self.moving(tenant) or self.cluster.peers.out.is_set(),
        )

    async def _open_moves(self, runtime: IncusRuntime, shared: Sharing, store: Store) -> None:
        services, cluster, tenants = self.services, self.cluster, runtime.tenants
        names, bus, deploying = services.names, services.bus, services.deployments.deploying

        def part(tenant: str) -> None:
            for connection in [one for one in services.connections if one.tenant == tenant]:
                connection.announce_draining(_RETRY_MS)
                connection.close(CloseCode.DRAINING, "the tenant moves to another server")

        def changed(tenant: str) -> None:
            cluster.changed()
            services.deployments.look_soon()

        names.elsewhere = cluster.instance_of
        moves = MoveLog(store)
        self._arrivals = Arrivals(
            *(cluster.own, tenants, runtime.moves, self._records, names, moves, bus),
            *(services.room, services.capacity, changed),
        )
        uses = Uses(
            doors=services.doors,
            part=part,
            execs=services.execs,
            files=services.files,
            workers=services.workers,
        )
        mover = Mover(
            *(cluster, shared.placements, tenants, runtime.moves, uses),
            leaving=runtime.containers.leaving,
            records=self._records,
            names=names,
            log_=moves,
            bus=bus,
            settings=services.settings,
            deploying=deploying,
        )
        self.departures = Departures(
            *(cluster, tenants, mover, services.lifecycle, moves, bus, services.settings, deploying, changed)
        )
        await self.departures.recover()

    def jobs(self) -> Mapping[str, Callable[[], Coroutine[Any, Any, None]]]:
        jobs: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "the removal of this server from the cluster": self._leave_cluster,
            "the revocations of the cluster": self._revoking.follow,
        }
        runtime, services = self.services.runtime, self.services
        if self._shared is not None and isinstance(runtime, IncusRuntime):
            quorum = Quorum(self.cluster.peers, self._shared.members, runtime.incus.has_quorum)
            jobs["the check for a quorum"] = quorum.follow
            jobs["the keys of the cluster"] = partial(
                self._shared.follow, self._revoking.look_soon, services.deployments.look_soon
            )
        if self._dead_peers is not None:
            jobs["the check of silent servers"] = self._dead_peers.follow
        if self.standby is not None:
            jobs["the copies of tenants"] = self.standby.copy
            jobs["the tenants of removed servers"] = self.standby.follow
        if self.departures is not None:
            jobs["the moves of an earlier process"] = self.departures.resume
        return jobs

    async def _leave_cluster(self) -> None:
        """Once this member is known to be removed from its cluster, end all uses of it."""
        await self.cluster.peers.out.wait()
        services = self.services
        for connection in list(services.connections):
            connection.close(CloseCode.TRY_LATER, RemovedFromCluster().message)
        services.doors.end_streams()
        caddy = services.lifecycle.caddy
        for domain in caddy.listed():
            caddy.show_error_page(domain, True)
        try:
            for tenant in await services.runtime.tenants.list():
                if tenant.status == "running":
                    await services.runtime.tenants.stop(tenant.name)
        except GatewayError as error:
            log.error("cannot stop the tenants of this removed server: %s", error.message)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield the metrics of a cluster."""
        up = "1 for a member whose gateway answers, 0 for one whose does not."
        peers = GaugeMetricFamily("gateway_peer_up", up, labels=["member"])
        for peer in self.cluster.peers.all.values():
            peers.add_metric([peer.name], int(peer.alive))
        yield peers
        relayed = "Open websockets of other members' tenants."
        yield GaugeMetricFamily("gateway_connections_relayed", relayed, value=len(self.tunnels))
        if self.standby is not None:
            late = "Tenants without a copy on another member that was up to date within three intervals."
            yield GaugeMetricFamily("gateway_standby_late", late, value=len(self.standby.late))

    def moving(self, tenant: str) -> bool:
        return self.departures is not None and self.departures.moving(tenant)

    async def rest(self, seconds: float) -> None:
        if self.departures is not None:
            await self.departures.rest(seconds)

    def go_on(self) -> None:
        if self.departures is not None:
            self.departures.go_on()

    async def hand_over(self) -> None:
        if self.departures is not None:
            await self.departures.close()

    def end_clients(self, retry_after_ms: int, why: str) -> None:
        told = protocol.notification("server/draining", {"retryAfterMs": retry_after_ms})
        for tunnel in list(self.tunnels):
            tunnel.end(text_frame(told), close_frame(CloseCode.DRAINING, why))
        self.cluster.refuse()  # so that peers connect again

    # --- for the other members ------------------------------------------------------------------------

    def changed(self) -> None:
        self.cluster.changed()

    @contextlib.asynccontextmanager
    async def serving(self, store: Store, app: ASGIApp) -> AsyncIterator[None]:
        """Serve `app` to the peers; enter once they have reported their tenants."""
        told: dict[str, Known] = {}

        async def tenants() -> list[Known]:
            found = {tenant.name: _known(tenant) for tenant in await self.services.runtime.tenants.list()}
            moving = self.departures
            # a tenant on its way has no instance for a moment, and is still ours
            found |= {name: one for name, one in told.items() if moving and moving.keeps(name)}
            told.clear()
            told.update(found)
            if self.standby is not None:  # so that all requests for these come here
                lost = (Known(name, status="error") for name in self.standby.lost)
                found = {one.name: one for one in lost} | found
            return [*found.values()]

        async def keep(_: Peer, text: bytes) -> Any:
            kept = await self._records.keep(text)
            if self.standby is not None:
                await self.standby.received(kept.tenant, kept.id)
            return {"id": kept.id}

        questions = self._questions()
        orders: dict[str, Order] = {} if self._arrivals is None else {**self._arrivals.orders()}
        if self.standby is not None:
            questions |= self.standby.questions()
            orders |= self.standby.orders()
        facts, uploads = {"version": __version__}, {PUT_RECORDS: keep}
        async with self.cluster.open(app, store, tenants, self.has, facts, questions, orders, uploads):
            await self.cluster.settle()
            yield

    def _questions(self) -> dict[str, Question]:
        """Return the questions that peers may ask, apart from who has a tenant."""

        async def secret(_: Peer, what: Any) -> Any:
            return {"secret": self.services.secret}

        async def revoked(peer: Peer, what: Mapping[str, Any]) -> Any:
            token, expires = str(what["id"]), what["expires"]
            until = math.inf if expires is None else float(expires)
            return {"closed": await self._revoking.heard(token, until, peer.name)}

        async def room(_: Peer, what: Any) -> Any:
            return (await self._room_here()).to_dict()

        return {ASK_SECRET: secret, TELL_REVOKED: revoked, ASK_ROOM: room}

    # --- where a tenant is ----------------------------------------------------------------------------

    def check_here(self, tenant: str) -> None:
        peer = self.cluster.homes.home(tenant)
        if peer is not None and not peer.alive:
            raise MemberAway(peer.name)
        if peer is not None:
            raise Unavailable(f"tenant {tenant} is on another member; connect again", reason="elsewhere")

    async def home_of(self, subject: Subject) -> Peer | None:
        """Return the peer that has a request's subject; None if that is here or nowhere."""
        name, cluster = subject.name, self.cluster
        if subject.kind == "tenant":
            peer, mine = cluster.homes.home(name), self.services.names.holder(name)
            if mine and (peer is None or await self.has({"tenant": name})):
                return None  # of two that report it, one has not noticed yet that it moved
            if peer is not None:
                return peer
        elif await self.has({subject.kind: name}):
            return None
        return await cluster.find(**{subject.kind: name})

    async def has(self, what: Mapping[str, Any]) -> bool:
        """Return whether this gateway is the home of a tenant, or has the record of a deployment."""
        services = self.services
        try:
            if "deployment" in what:
                await services.deployments.get(str(what["deployment"]))
            else:
                name = str(what["tenant"])
                if self.cluster.homes.home(name) is not None or not services.names.holder(name):
                    check_covered(None, name)
                    await services.runtime.tenants.get(name)
        except (NotFound, OnAnotherServer):
            return False
        return True

    async def place(self, request: Request, tenant: str, *, here: bool = False) -> PeerHome | None:
        cluster = self.cluster
        # a request that a peer has placed here stays
        if (FROM in request.scope and not here) or not TENANT_NAME.fullmatch(tenant):
            return None
        peer = await self.home_of(Subject("tenant", tenant))
        if peer is not None:
            return PeerHome(self, peer)
        if await self.has({"tenant": tenant}):
            return None
        wish = cluster.own
        if not here and self.services.settings.placement == "spread":
            wish = await self.roomiest() or cluster.own
        chosen = await cluster.place(tenant, wish)
        return None if chosen == cluster.own else PeerHome(self, cluster.peers.all[chosen])

    async def roomiest(self, *, own: bool = True) -> str | None:
        """Return the member with the smallest share of its memory in use, preferring this one among equals.

        None where no other takes new tenants, and `own` does not count or is drained too.
        """
        cluster = self.cluster
        rooms = dict(await cluster.rooms())
        if own and not cluster.peers.drained:
            rooms[cluster.own] = await self._room_here()
        known = [room.takes for room in rooms.values() if room.takes is not None]
        usual = max(known, default=1)
        return min(
            rooms, key=lambda name: (*rooms[name].used(usual), name != cluster.own, name), default=None
        )

    async def _room_here(self) -> Room:
        tenants = await self.services.runtime.tenants.list()
        running = sum(one.status == "running" for one in tenants)
        return Room(running, await self.services.capacity.takes(tenants))

    # --- answers of several members -------------------------------------------------------------------

    async def ask_others(self, request: Request) -> OtherAnswers:
        if FROM in request.scope:  # one of them is asking
            return OtherAnswers()
        client = client_of(request.scope, address(request))
        return OtherAnswers(*await ask_same(request.scope, self.cluster.peers, client))

    def absent(self, token: Token, others: OtherAnswers) -> Iterable[dict[str, Any]]:
        settings = self.services.settings
        if self.standby is not None:
            for name in filter(token.covers, self.standby.lost):
                lost = TenantInstance(name, "error", location=self.standby.home(name))
                yield described(lost, settings) | {"reason": "member_away"}
        silent = () if others.silent is None else self.cluster.homes.unheard(others.silent)
        for peer, known in silent:
            if token.covers(known.name):
                tenant = TenantInstance(
                    known.name,
                    "error",
                    domain=known.domain,
                    created=known.created,
                    location=peer.name,
                    asleep=known.asleep,
                )
                more = {"status": known.status} if peer.alive else {"reason": "member_away"}
                yield described(tenant, settings) | more
        for leaving in () if self.departures is None else self.departures.listed():
            if token.covers(leaving.name):
                yield described(leaving, settings)

    def described(self, tenant: str) -> Mapping[str, Any]:
        return {} if self.standby is None else {"standby": self.standby.of(tenant)}

    def tenant_of(self, request: Request, token: Token) -> str | None:
        return None if PART in request.headers else super().tenant_of(request, token)

    async def events(
        self, request: Request, token: Token, filter: Filter, last_event_id: str | None
    ) -> sse.Streaming | None:
        subject = Subject.of(request.scope)
        assert subject is not None
        subject = subject.by(token)
        # what is asked for has no home, or none yet
        if FROM not in request.scope and (
            subject.kind == "events" or not await self.has({subject.kind: subject.name})
        ):
            return await self._merged_events(request, filter, last_event_id)
        tenant = self.tenant_of(request, token)
        if tenant is None or not await self._came(tenant, last_event_id):
            return None
        known = positions.vector(last_event_id or "") or {}
        begin = self.services.names.arrived(tenant) - 1
        return await self._merged_events(request, filter, last_event_id, only=known, begin=begin)

    async def _came(self, tenant: str, last: str | None) -> bool:
        """Return whether a client continues from the tenant's former home, which has the earlier events."""
        known = positions.vector(last or "")
        if known is None or self.departures is None:
            return False
        move = await self.departures.last(tenant)
        if move is None or move.state != "moved" or move.target != self.member:
            return False
        return move.source in known and move.source in self.cluster.peers.all

    async def _merged_events(
        self,
        request: Request,
        filter: Filter,
        last: str | None,
        *,
        only: Collection[str] | None = None,
        begin: int | None = None,
    ) -> sse.Streaming:
        """Return the events of all members, or of some."""
        gateway, peers = self.services, self.cluster.peers
        hold(request.scope, AHEAD * len(peers.all))
        standing = PeerStream(request.scope, client_of(request.scope, address(request)), peers)
        merged = MergedEvents(
            *(gateway.bus, filter, self.member, peers, standing, last), only=only, begin=begin
        )
        request.scope[USES].callback(merged.end)
        await merged.begin()
        return sse.Streaming(
            merged.parts(), merged.close, positions.text(merged.at), gateway.settings, resumed=merged.resumed
        )

    # --- requests -------------------------------------------------------------------------------------

    async def answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await app(scope, receive, send)
            return
        subject = Subject.of(scope)
        if self.cluster.peers.out.is_set() and scope["path"] not in _OUTSIDE:
            await _refuse(RemovedFromCluster(), scope, receive, send)
        elif subject is None:
            await app(scope, receive, send)
        elif FROM in scope:
            await self._answer_peer(app, subject, scope, receive, send)
        elif scope["type"] == "http":
            await _Relayed(app, self, scope, receive, send).http(subject)
        else:
            await _Relayed(app, self, scope, receive, send).websocket(subject.name)

    async def _answer_peer(
        self, app: ASGIApp, subject: Subject, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request that a peer passed on."""
        if PART in Headers(scope=scope) or subject.kind == "events":
            await app(scope, receive, send)
            return
        try:
            if subject.kind == "tenant":
                await self.services.doors.wait(subject.name)
        except GatewayError as error:
            await _refuse(error, scope, receive, send)
            return
        with self.inside(subject, scope):
            if await self._may_have(subject):
                await app(scope, receive, send)
            else:
                await _not_home(scope, receive, send)

    def inside(self, subject: Subject, scope: Scope) -> contextlib.AbstractContextManager[None]:
        """Count a call for a tenant as under way, unless it stays open until a client ends it."""
        brief = scope["type"] == "http" and not scope["path"].endswith(_LASTING)
        if not brief or subject.kind != "tenant":
            return contextlib.nullcontext()
        return self.services.doors.inside(subject.name)

    async def _may_have(self, subject: Subject) -> bool:
        """Return whether this gateway has a subject; True if it cannot tell: the route then says why."""
        try:
            return await self.has({subject.kind: subject.name})
        except GatewayError:
            return True


class PeerHome:
    """The peer that is, or will be, a tenant's home."""

    def __init__(self, topology: ClusterTopology, peer: Peer) -> None:
        self._topology, self.peer = topology, peer

    def answer(self, request: Request, body: bytes, path: str | None = None) -> Response:
        return _Passed(self._topology, request, self.peer, body, path)


class _Passed(Response):
    """The answer of a peer to a request whose body was read here; it may be another one, by `path`."""

    def __init__(
        self, topology: ClusterTopology, request: Request, peer: Peer, body: bytes, path: str | None
    ) -> None:
        self._topology, self._request, self._peer = topology, request, peer
        self._body, self._path = body, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = [{"type": "http.request", "body": self._body, "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        kept: Sequence[tuple[bytes, bytes]] = [
            (name, value)
            for name, value in scope["headers"]
            if name not in (b"content-length", b"transfer-encoding", b"x-request-id")
        ]
        length = str(len(self._body)).encode()
        headers = [*kept, (b"content-length", length), (b"x-request-id", scope[REQUEST_ID].encode())]
        scope = {**scope, "headers": headers}
        if self._path is not None:
            scope |= {"path": self._path, "raw_path": self._path.encode(), "query_string": b""}
        await relay(
            *(scope, again, send, self._topology.cluster.peers, self._peer),
            body=Body(scope, again),
            client=client_of(scope, address(self._request)),
            patience=http.BODY_TIMEOUT,
        )


def of(request: HTTPConnection) -> ClusterTopology | None:
    """Return the topology of a request's gateway, None if it is in no cluster."""
    found = services(request).topology
    return found if isinstance(found, ClusterTopology) else None


def _known(tenant: TenantInstance) -> Known:
    asleep = tenant.asleep and tenant.status != "running"
    return Known(tenant.name, tenant.domain, tenant.status, asleep, tenant.instance, tenant.created)


async def _refuse(error: GatewayError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await problem(error)(scope, receive, send)
    else:
        await refuse(WebSocket(scope, receive, send), close_code(error), error.message)


async def _not_home(scope: Scope, receive: Receive, send: Send) -> None:
    answer = problem(Misdirected("this gateway does not have it; ask its home"))
    answer.headers[NOT_HOME] = "1"
    if scope["type"] == "http":
        await answer(scope, receive, send)
    else:
        await WebSocket(scope, receive, send).send_denial_response(answer)


class _Relayed:
    """One request, which may belong to another member."""

    def __init__(
        self, app: ASGIApp, topology: ClusterTopology, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._topology, self._services, self._cluster = topology, topology.services, topology.cluster
        self._scope, self._receive, self._send = scope, receive, send
        self._here = partial(app, scope, receive, send)
        self._asked = HTTPConnection({**scope, "app": app})
        self._client = client_of(scope, address(self._asked))

    def _token(self) -> Token | None:
        """Return the token, None without one. Raises `Forbidden` and `Unauthorized`."""
        check_origin(self._asked)
        raw = raw_token(self._asked)
        return None if raw is None else self._services.verify(raw)

    async def _home(self, subject: Subject) -> Peer | None:
        """Return the peer that has a subject; None if that is unknown, for the route to say why."""
        try:
            return await self._topology.home_of(subject)
        except GatewayError:
            return None

    # --- HTTP ---------------------------------------------------------------------------------------

    async def http(self, subject: Subject) -> None:
        """Answer the request here, or pass it on to the tenant's home."""
        try:
            token = self._token()
            if token is None:
                raise Unauthorized("no token")
            subject = subject.by(token)
            if subject.kind == "tenant":
                check_covered(token, subject.name)
        except GatewayError:
            await self._here()  # which says what is wrong
            return
        try:
            if subject.kind == "tenant":
                await self._services.doors.wait(subject.name)
        except GatewayError as error:
            await problem(error)(self._scope, self._receive, self._send)
            return
        with self._topology.inside(subject, self._scope):
            peer = None if subject.kind == "events" else await self._home(subject)
            if peer is None:
                await self._here()
                return
        try:
            await self._http(subject, token, peer)
        except GatewayError as error:
            await problem(error)(self._scope, self._receive, self._send)

    async def _http(self, subject: Subject, token: Token, peer: Peer) -> None:
        services, scope = self._services, self._scope
        if services.draining:
            raise shutting_down()
        share = subject.name if subject.kind == "tenant" else f"sub {token.subject}"
        ask(scope, services.limits, share)
        hold(scope, _WINDOW)
        body = Body(scope, self._receive)
        settings = services.settings
        patience = max(http.BODY_TIMEOUT, settings.transfer_stall)
        scope = {**scope, "headers": [*_without_id(scope), (b"x-request-id", scope[REQUEST_ID].encode())]}
        for left in (1, 0):
            try:
                await relay(
                    *(scope, self._receive, self._send, self._cluster.peers, peer),
                    body=body,
                    client=self._client,
                    patience=patience,
                )
            except NotHome:
                again = await self._moved(subject, left)
                if body.lost:
                    raise Unavailable("the tenant has just moved; try again", reason="moved") from None
                peer = again
            else:
                return

    async def _moved(self, subject: Subject, left: int) -> Peer:
        """Return the peer that now has what the previous one no longer has; `left` more peers may be asked.

        Raises `NotFound`, or `Unavailable` if the client should ask again.
        """
        if await self._topology.has({subject.kind: subject.name}):
            raise Unavailable(
                f"{subject.kind} {subject.name[:63]} has just moved here; try again",
                reason="moved",
                retry_after=1,
            )
        again = await self._cluster.find_moved(**{subject.kind: subject.name}) if left else None
        if again is None:
            raise NotFound(f"no {subject.kind} {subject.name[:63]}")
        return again

    # --- websockets ---------------------------------------------------------------------------------

    async def websocket(self, tenant: str) -> None:
        """Answer a tenant's websocket, or join it to the tenant's home.

        A websocket whose token comes only with `initialize` is joined too, if the home is known. As here, it
        is accepted for any name and learns nothing before its token has been checked.
        """
        try:
            token = self._token()
            check_covered(token, tenant)
        except GatewayError:
            await self._here()
            return
        services = self._services
        try:
            await services.doors.wait(tenant)
        except GatewayError as error:
            await _refuse(error, self._scope, self._receive, self._send)
            return
        if services.draining:
            peer = None
        elif token is not None:
            peer = await self._home(Subject("tenant", tenant))
        else:
            peer = None if services.names.holder(tenant) else self._cluster.homes.home(tenant)
        if peer is None or TAKE not in self._scope["extensions"] or (token is None and not peer.alive):
            await self._here()  # without its home `initialize` says why
            return
        websocket = WebSocket(self._scope, self._receive, self._send)
        try:
            await self._join(tenant, token, peer)
        except RateLimited as full:
            await refuse(websocket, CloseCode.TOO_MANY, full.message)
        except Unavailable as error:  # a home that is away, or not known for a moment
            await refuse(websocket, CloseCode.TRY_LATER, error.message)
        except NotFound as error:
            await refuse(websocket, CloseCode.UNKNOWN_TENANT, error.message)

    async def _join(self, tenant: str, token: Token | None, peer: Peer) -> None:
        """Join the client to its home.

        Raises `Unavailable`, `NotFound` or `RateLimited` before it is joined.
        """
        services, near = self._services, None
        limits = services.limits

        def displaced() -> None:
            if near is not None:
                near.end(close_frame(CloseCode.TOO_MANY, "too many connections without a token"))

        with contextlib.ExitStack() as stack:
            if token is not None:
                stack.enter_context(limits.sockets.reserve(tenant))
            else:
                stack.enter_context(limits.strangers.reserve(address(self._asked), displaced=displaced))
            protocol = self._scope["extensions"][TAKE]["protocol"]
            protocol.hold()
            try:
                home, far, head = await self._dialed(tenant, peer)
            except HandshakeRefused as refused:
                protocol.give_up()
                protocol.transport.write(refused.answer)
                return
            finally:
                protocol.let_go()

            def sent(params: Mapping[str, Any]) -> None:
                """Count the client as its tenant's once it has shown a token."""
                assert near is not None
                with contextlib.suppress(GatewayError):
                    shown = services.verify(params.get("token"))
                    if shown.covers(tenant):
                        place = limits.sockets.reserve(tenant)
                        stack.close()  # which is the stranger's place
                        stack.enter_context(place)

            near = ClientEnd(protocol, far, head, None if token is not None else FirstMessage(sent))
            home.cut.add(cut := partial(near.end, close_frame(CloseCode.TRY_LATER, "its server is away")))
            self._topology.tunnels.add(near)
            try:
                await near.over
            finally:
                self._topology.tunnels.discard(near)
                home.cut.discard(cut)

    async def _dialed(self, tenant: str, peer: Peer) -> tuple[Peer, ServerEnd, bytes]:
        """Return the peer that accepts the websocket, the connection to it, and the head of its answer."""
        for left in (1, 0):
            try:
                return peer, *await dial(self._scope, peer, self._client)
            except NotHome:
                peer = await self._moved(Subject("tenant", tenant), left)
        raise AssertionError


def _without_id(scope: Scope) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
