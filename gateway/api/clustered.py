"""Passes a request on to the tenant's home, before any route sees it.

All other requests are answered as without a cluster. A request without a valid token for the tenant is never
looked up, so its answer reveals nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from gateway import __version__, protocol
from gateway.api.access import check_covered, check_origin, raw_token
from gateway.api.asked import Asked, has, home_of
from gateway.api.connection import close_code
from gateway.api.first_message import FirstMessage
from gateway.api.http import REQUEST_ID, address, ask, hold, problem, shutting_down
from gateway.api.placing import room_here
from gateway.api.routes import recovery
from gateway.api.routes.websocket import refuse
from gateway.api.services import Services
from gateway.auth.tokens import Token
from gateway.cluster.cluster import ASK_ROOM, ASK_SECRET, PUT_RECORDS, TELL_REVOKED
from gateway.cluster.dialing import dial
from gateway.cluster.known import Known
from gateway.cluster.listener import FROM, Question
from gateway.cluster.peers import Peer, Removed
from gateway.cluster.relay import NOT_HOME, PART, Body, NotHome, client_of, relay
from gateway.errors import GatewayError, NotFound, RateLimited, Unauthorized, Unavailable
from gateway.hostnames import Misdirected
from gateway.protocol import CloseCode
from gateway.runtime import Tenant
from gateway.storage.store import Store
from gateway.transport.tunnel import Far, Near, Refused, close_frame, text_frame
from gateway.transport.websocket import TAKE

log = logging.getLogger(__name__)

_LASTING: Final = ("/events", "/logs", "/ws", "/mcp")  # paths of what stays open
_OUTSIDE: Final = ("/healthz", "/metrics")  # what a removed server still answers
_WINDOW: Final = 512 << 10  # bytes that are on their way through here, of one request and its answer


def relaying(app: ASGIApp, services: Callable[[], Services | None]) -> ASGIApp:
    """Return `app` with a layer that passes on requests for other members' tenants."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        found = services()
        clustered = found is not None and found.cluster is not None
        asks = scope["type"] in ("http", "websocket")
        asked = Asked.of(scope) if clustered and asks else None
        if _removed(found) and asks and scope["path"] not in _OUTSIDE:
            await _refuse(Removed(), scope, receive, send)
        elif found is None or asked is None:
            await app(scope, receive, send)
        elif FROM in scope:
            await _for_peer(app, found, asked, scope, receive, send)
        elif scope["type"] == "http":
            await _Relayed(app, found, scope, receive, send).http(asked)
        else:
            await _Relayed(app, found, scope, receive, send).websocket(asked.name)

    return wrapped


def _removed(services: Services | None) -> bool:
    """Return whether this server is known to be removed from its cluster."""
    return services is not None and services.cluster is not None and services.cluster.peers.out.is_set()


async def _for_peer(
    app: ASGIApp, services: Services, asked: Asked, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer a request that a peer passed on."""
    if PART in Headers(scope=scope) or asked.kind == "events":
        await app(scope, receive, send)
        return
    try:
        if asked.kind == "tenant":
            await services.doors.wait(asked.name)
    except GatewayError as error:
        await _refuse(error, scope, receive, send)
        return
    with _inside(services, asked, scope):
        if await _may_have(services, asked):
            await app(scope, receive, send)
        else:
            await _not_home(scope, receive, send)


def _inside(services: Services, asked: Asked, scope: Scope) -> contextlib.AbstractContextManager[None]:
    """Count a call for a tenant as under way, unless it stays open until somebody ends it."""
    brief = scope["type"] == "http" and not scope["path"].endswith(_LASTING)
    return services.doors.inside(asked.name) if brief and asked.kind == "tenant" else contextlib.nullcontext()


async def _refuse(error: GatewayError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await problem(error)(scope, receive, send)
    else:
        await refuse(WebSocket(scope, receive, send), close_code(error), error.message)


@contextlib.asynccontextmanager
async def opened(services: Services, store: Store, app: ASGIApp) -> AsyncIterator[None]:
    """Serve `app` to the peers, if there is a cluster; return once they have reported their tenants."""
    cluster = services.cluster
    if cluster is None:
        yield
        return

    told: dict[str, Known] = {}

    async def tenants() -> list[Known]:
        found = {tenant.name: _known(tenant) for tenant in await services.runtime.tenants.list()}
        moving = services.departures
        # one on its way has no instance for a moment, and is still ours
        found |= {name: one for name, one in told.items() if moving and moving.keeps(name)}
        told.clear()
        told.update(found)
        if services.standby is not None:  # so that all requests for these come here
            lost = (Known(name, status="error") for name in services.standby.lost)
            found = {one.name: one for one in lost} | found
        return [*found.values()]

    async def keep(_: Peer, text: bytes) -> Any:
        kept = await services.records.keep(text)
        if services.standby is not None:
            await services.standby.received(kept.tenant, kept.id)
        return {"id": kept.id}

    facts, questions = {"version": __version__}, _questions(services)
    uploads = {PUT_RECORDS: keep}
    orders = {} if services.arrivals is None else {**services.arrivals.orders()}
    if services.standby is not None:
        questions |= recovery.questions(services.standby)
        orders |= recovery.orders(services.standby)
    async with cluster.open(app, store, tenants, partial(has, services), facts, questions, orders, uploads):
        await cluster.settle()
        yield


def _questions(services: Services) -> dict[str, Question]:
    """Return the questions that peers may ask, apart from who has a tenant."""

    async def secret(_: Peer, what: Any) -> Any:
        return {"secret": services.secret}

    async def revoked(peer: Peer, what: Mapping[str, Any]) -> Any:
        token, expires = str(what["id"]), what["expires"]
        assert services.revoking is not None
        until = math.inf if expires is None else float(expires)
        return {"closed": await services.revoking.heard(token, until, peer.name)}

    async def room(_: Peer, what: Any) -> Any:
        return (await room_here(services)).to_dict()

    return {ASK_SECRET: secret, TELL_REVOKED: revoked, ASK_ROOM: room}


def _known(tenant: Tenant) -> Known:
    asleep = tenant.asleep and tenant.status != "running"
    return Known(tenant.name, tenant.domain, tenant.status, asleep, tenant.instance, tenant.created)


def leave(services: Services, retry_after_ms: int, why: str) -> None:
    """Tell clients of other members' tenants that this gateway ends, and peers to connect again."""
    told = protocol.notification("server/draining", {"retryAfterMs": retry_after_ms})
    for tunnel in list(services.tunnels):
        tunnel.end(text_frame(told), close_frame(CloseCode.DRAINING, why))
    if services.cluster is not None:
        services.cluster.refuse()


async def _may_have(services: Services, asked: Asked) -> bool:
    """Return whether this gateway has what is asked for.

    True also if it cannot tell: the route then says why.
    """
    try:
        return await has(services, {asked.kind: asked.name})
    except GatewayError:
        return True


async def _not_home(scope: Scope, receive: Receive, send: Send) -> None:
    answer = problem(Misdirected("this gateway does not have it; ask its home"))
    answer.headers[NOT_HOME] = "1"
    if scope["type"] == "http":
        await answer(scope, receive, send)
    else:
        await WebSocket(scope, receive, send).send_denial_response(answer)


class _Relayed:
    """One request, which may belong to another member."""

    def __init__(self, app: ASGIApp, services: Services, scope: Scope, receive: Receive, send: Send) -> None:
        assert services.cluster is not None
        self._services = services
        self._cluster = services.cluster
        self._scope, self._receive, self._send = scope, receive, send
        self._here = partial(app, scope, receive, send)
        self._asked = HTTPConnection({**scope, "app": app})
        self._client = client_of(scope, address(self._asked))

    def _token(self) -> Token | None:
        """Return the token, None without one. Raises `Forbidden` and `Unauthorized`."""
        check_origin(self._asked)
        raw = raw_token(self._asked)
        return None if raw is None else self._services.verify(raw)

    async def _home(self, asked: Asked) -> Peer | None:
        """Return the peer that has what is asked for; None if that is unknown, for the route to say why."""
        try:
            return await home_of(self._services, asked)
        except GatewayError:
            return None

    # --- HTTP ---------------------------------------------------------------------------------------

    async def http(self, asked: Asked) -> None:
        """Answer the request here, or pass it on to the tenant's home."""
        try:
            token = self._token()
            if token is None:
                raise Unauthorized("no token")
            asked = asked.by(token)
            if asked.kind == "tenant":
                check_covered(token, asked.name)
        except GatewayError:
            await self._here()  # which says what is wrong
            return
        try:
            if asked.kind == "tenant":
                await self._services.doors.wait(asked.name)
        except GatewayError as error:
            await problem(error)(self._scope, self._receive, self._send)
            return
        with _inside(self._services, asked, self._scope):
            peer = None if asked.kind == "events" else await self._home(asked)
            if peer is None:
                await self._here()
                return
        try:
            await self._http(asked, token, peer)
        except GatewayError as error:
            await problem(error)(self._scope, self._receive, self._send)

    async def _http(self, asked: Asked, token: Token, peer: Peer) -> None:
        services, scope = self._services, self._scope
        if services.draining:
            raise shutting_down()
        share = asked.name if asked.kind == "tenant" else f"sub {token.subject}"
        ask(scope, services.limits, share)
        hold(scope, _WINDOW)
        body = Body(scope, self._receive)
        settings = services.settings
        patience = max(settings.body_timeout, settings.transfer_stall)
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
                again = await self._moved(asked, left)
                if body.lost:
                    raise Unavailable("the tenant has just moved; try again", reason="moved") from None
                peer = again
            else:
                return

    async def _moved(self, asked: Asked, left: int) -> Peer:
        """Return the peer that now has what the one we asked no longer has; `left` further ones may be asked.

        Raises `NotFound`, or `Unavailable` if the client should ask again.
        """
        if await has(self._services, {asked.kind: asked.name}):
            raise Unavailable(
                f"{asked.kind} {asked.name[:63]} has just moved here; try again",
                reason="moved",
                retry_after=1,
            )
        again = await self._cluster.find_moved(**{asked.kind: asked.name}) if left else None
        if again is None:
            raise NotFound(f"no {asked.kind} {asked.name[:63]}")
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
            peer = await self._home(Asked("tenant", tenant))
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
            except Refused as refused:
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

            near = Near(protocol, far, head, None if token is not None else FirstMessage(sent))
            home.cut.add(cut := partial(near.end, close_frame(CloseCode.TRY_LATER, "its server is away")))
            services.tunnels.add(near)
            try:
                await near.over
            finally:
                services.tunnels.discard(near)
                home.cut.discard(cut)

    async def _dialed(self, tenant: str, peer: Peer) -> tuple[Peer, Far, bytes]:
        """Return the peer that accepts the websocket, the connection to it, and the head of its answer."""
        for left in (1, 0):
            try:
                return peer, *await dial(self._scope, peer, self._client)
            except NotHome:
                peer = await self._moved(Asked("tenant", tenant), left)
        raise AssertionError


def _without_id(scope: Scope) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
