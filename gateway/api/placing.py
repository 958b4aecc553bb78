"""Chooses the member that gets a new tenant, and has the request answered there."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway.api.asked import Asked, has, home_of
from gateway.api.http import REQUEST_ID, address
from gateway.api.services import Services, services
from gateway.cluster.cluster import Cluster
from gateway.cluster.listener import FROM
from gateway.cluster.peers import Peer
from gateway.cluster.relay import Body, client_of, relay
from gateway.cluster.room import Room
from gateway.runtime import TENANT_NAME


async def placed(request: Request, tenant: str, *, here: bool = False) -> Peer | None:
    """Return the peer that is, or will be, a tenant's home; None if it is this gateway.

    A request that a peer has placed here stays. `here` says that the request is also about another tenant,
    which is here: a new one is then created here too. The token must cover the tenant. Raises `Unavailable`
    if this cannot be decided.
    """
    gateway = services(request)
    cluster = gateway.cluster
    if cluster is None or (FROM in request.scope and not here) or not TENANT_NAME.fullmatch(tenant):
        return None
    peer = await home_of(gateway, Asked("tenant", tenant))
    if peer is not None or await has(gateway, {"tenant": tenant}):
        return peer
    wish = cluster.own
    if not here and gateway.settings.placement == "spread":
        wish = await roomiest(gateway, cluster) or cluster.own
    chosen = await cluster.place(tenant, wish)
    return None if chosen == cluster.own else cluster.peers.all[chosen]


async def roomiest(gateway: Services, cluster: Cluster, *, own: bool = True) -> str | None:
    """Return the member with the smallest share of its memory in use, preferring this one among equals.

    None where no other takes new tenants, and `own` does not count or is drained too.
    """
    rooms = dict(await cluster.rooms())
    if own and not cluster.peers.drained:
        rooms[cluster.own] = await room_here(gateway)
    known = [room.takes for room in rooms.values() if room.takes is not None]
    usual = max(known, default=1)
    return min(rooms, key=lambda name: (*rooms[name].used(usual), name != cluster.own, name), default=None)


async def room_here(gateway: Services) -> Room:
    """Return how much room this member has."""
    tenants = await gateway.runtime.tenants.list()
    running = sum(one.status == "running" for one in tenants)
    return Room(running, await gateway.lifecycle.capacity.takes(tenants))


class Passed(Response):
    """The answer of a peer to a request whose body was read here; it may be another one, by `path`."""

    def __init__(self, request: Request, peer: Peer, body: bytes, path: str | None = None) -> None:
        self._request, self._peer, self._body, self._path = request, peer, body, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = services(self._request)
        assert gateway.cluster is not None
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
            *(scope, again, send, gateway.cluster.peers, self._peer),
            body=Body(scope, again),
            client=client_of(scope, address(self._request)),
            patience=gateway.settings.body_timeout,
        )
