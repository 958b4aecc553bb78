"""Wires the gateway into one ASGI application: routes, what lives for the process, the shutdown order.

It decides nothing: requests are checked and handed to the rooms that know.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
from pydantic import Field
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from gateway import __version__, protocol
from gateway.api import editor
from gateway.api.connection import CLOSE_CODES, Connection, Hub
from gateway.api.http import (
    RETRY_AFTER_MS,
    SHARE,
    USES,
    InParts,
    address,
    as_json,
    ask,
    end,
    file_path,
    for_own_hosts,
    hold,
    problem,
    problem_handler,
    read_body,
    read_json,
    unless_gone,
    weighed,
    with_request_id,
)
from gateway.api.metrics import Metrics
from gateway.api.oneshot import ExecBody, run
from gateway.audit import Audit
from gateway.auth import tokens
from gateway.auth.grants import Grants
from gateway.auth.revocations import Revocations
from gateway.caddy import Caddy
from gateway.deployments import Deployments, Health, Record
from gateway.deployments.http import DeployBody, templates
from gateway.errors import (
    Conflict,
    Forbidden,
    GatewayError,
    InvalidParams,
    NotFound,
    RateLimited,
    Timeout,
    Unauthorized,
    Unavailable,
)
from gateway.events import Bus, Filter, StoredJournal, sse
from gateway.execs import Execs
from gateway.files import http
from gateway.files.files import Files
from gateway.host.setup import pin
from gateway.idempotency import Idempotency
from gateway.lifecycle.idle import Idle
from gateway.lifecycle.lifecycle import Ask, Following, Lifecycle, described
from gateway.limits.budget import SMALL, Budget, Places
from gateway.limits.capacity import Capacity
from gateway.limits.disk import DiskSpace
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains
from gateway.ownership.names import Names
from gateway.protocol import CloseCode
from gateway.rootfs.workers import BrokerClient, Workers
from gateway.runtime import TENANT_NAME, Removal, TenantEvent, TenantRuntime
from gateway.runtime.incus import IncusRuntime, IncusSites
from gateway.runtime.local import LocalRuntime
from gateway.runtime.local_sites import LocalSites
from gateway.runtime.sites import Sites
from gateway.settings import Settings
from gateway.shells import Shells
from gateway.storage.store import Store, StoreFailed
from gateway.tasks import apart, lasting
from gateway.tools.toolbox import Toolbox
from gateway.transport.http1 import ABORT

if TYPE_CHECKING:
    from gateway.api.mcp import Mcp

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

# after these a tenant's files may be others, or must no longer be held
_MOVED: Final = frozenset(
    {
        "tenant.stopped",
        "tenant.restarted",
        "tenant.destroyed",
        "tenant.renamed",
        "incus.instance-restored",
        "incus.instance-updated",
    }
)

# a tenant of this name is new; one that waited for it was renamed
_MADE: Final = frozenset({"tenant.created", "tenant.renamed"})

_PAGE: Final = 1000  # tenants of one answer, where a limit is named

_STARTED: Final = frozenset({"tenant.started", "tenant.restarted", "gateway.resynced"})


_LINGER: Final = 5.0  # seconds that an answer which must end may take to be read
_SESSION_MAX: Final = 32 << 10  # bytes of a body that anybody may send


class SessionBody(protocol.Params):
    token: Annotated[str, Field(max_length=tokens.MAX_TOKEN)]
    slot: Annotated[str, Field(pattern=f"^{tokens.SLOT}$")] | None = None


class RevokeBody(protocol.Params):
    """`id` is the token's `jti`."""

    id: Annotated[str, Field(min_length=1, max_length=200)]


class Gateway:
    """One gateway process: everything that lives as long as it, and the application that serves it.

    Whoever serves `app` holds `store` open around it, so that records which cannot be used end the start
    as one line.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.draining = False
        self.store = Store(settings.state_dir, settings.store_waiting)
        self.journal = StoredJournal(
            self.store,
            kept=settings.events_kept,
            kept_bytes=settings.events_bytes,
            age=settings.events_age,
            waiting=settings.events_waiting,
        )
        self.bus = Bus(self.journal)
        self._secret = tokens.load_secret(settings)
        self.revocations = Revocations(self.store)
        self.grants = Grants(self._is_revoked)
        self.names = Names(self.store, self.bus, settings)
        self.audit = Audit(self.store, self.bus, settings)
        self._hub: Hub | None = None
        self._drained: asyncio.Task[None] | None = None
        self._started = asyncio.Event()
        self._resynced = asyncio.Event()
        self._deploys: Deployments | None = None
        self._health: Health | None = None
        self._life_of: Lifecycle | None = None
        self._domains: Domains | None = None
        self._notice: tuple[Callable[[TenantEvent], None], ...] = ()
        self._mcp: Mcp | None = None
        self.budget = Budget(settings.bytes_in_flight, settings.tenant_bytes)
        self.places = Places(settings)
        self.metrics = Metrics(
            self._count_connections,
            self._count_execs,
            self._count_contested,
            self._count_shared,
            self.budget,
            self.places,
        )
        app = Starlette(
            routes=self._routes(),
            lifespan=self._lifespan,
            exception_handlers={
                GatewayError: problem_handler,
                HTTPException: problem_handler,
                ClientDisconnect: problem_handler,
                Exception: problem_handler,
            },
        )
        self.app = with_request_id(for_own_hosts(app, settings), settings.body_timeout)

    def _routes(self) -> list[Route | WebSocketRoute]:
        tenant = "/v1/tenants/{tenant}"
        return [
            Route("/", editor.page),
            Route("/assets/{name}", editor.asset),
            Route("/favicon.svg", editor.icon),
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", self._metrics),
            Route("/v1/session", self._session),
            Route("/v1/session", self._session_open, methods=["POST"]),
            Route("/v1/session", self._session_close, methods=["DELETE"]),
            Route("/v1/tenants", self._tenants),
            Route(tenant, self._tenant),
            *(
                Route(tenant + path, self._life(method, scope, handler, status), methods=[method])
                for method, path, scope, handler, status in Lifecycle.ROUTES
            ),
            Route(tenant + "/metrics", self._tenant_metrics),
            Route(tenant + "/site", self._site),
            Route(tenant + "/tools/{tool}", self._tool, methods=["POST"]),
            Route(tenant + "/exec", self._exec, methods=["POST"]),
            Route(tenant + "/files/{path:any}", self._file),
            Route(tenant + "/files/{path:any}", self._file_put, methods=["PUT"]),
            Route(tenant + "/files/{path:any}", self._file_delete, methods=["DELETE"]),
            Route(tenant + "/mcp", self._mcp_endpoint, methods=["GET", "POST", "DELETE"]),
            Route("/v1/wake", self._wake),
            Route("/v1/templates", self._templates),
            Route("/v1/deployments", self._deployments),
            Route("/v1/deployments", self._deploy, methods=["POST"]),
            Route("/v1/deployments/{deployment}", self._deployment),
            Route("/v1/deployments/{deployment}", self._deployment_cancel, methods=["DELETE"]),
            Route("/v1/events", self._events),
            Route("/v1/revocations", self._revoke, methods=["POST"]),
            Route("/v1/audit", self._audit),
            WebSocketRoute(tenant + "/ws", self._websocket),
        ]

    # --- lifespan ---------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Open everything in the order of who needs whom; close it in reverse."""
        settings = self.settings
        runtime_type = IncusRuntime if settings.runtime == "incus" else LocalRuntime
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.journal)
            idempotency = await Idempotency.opened(self.store, settings)
            self.revocations = await Revocations.opened(self.store)
            self.names = await Names.opened(self.store, self.bus, settings)
            self.audit = await stack.enter_async_context(Audit(self.store, self.bus, settings))
            runtime: IncusRuntime | LocalRuntime = await stack.enter_async_context(
                runtime_type(settings, self._removed)
            )
            workers = await stack.enter_async_context(Workers(settings, tenants=runtime.tenants))
            execs = await stack.enter_async_context(Execs(runtime, self.bus, idempotency, settings))
            shells = await stack.enter_async_context(Shells(execs, workers, settings))
            toolbox = await stack.enter_async_context(
                Toolbox(runtime, workers, shells, self.bus, idempotency, settings)
            )
            files = await stack.enter_async_context(Files(runtime, workers, self.bus, settings))
            sites: Sites = await stack.enter_async_context(
                IncusSites(settings, runtime)
                if isinstance(runtime, IncusRuntime)
                else LocalSites(settings, runtime)
            )
            caddy = await stack.enter_async_context(Caddy(settings))
            caddy.lead_home()
            caddy.excuse_nobody()
            domains = self._domains = await Domains.opened(runtime, self.store, self.bus, settings)
            room = DiskSpace(runtime, workers, self.store, settings, sites.spare)
            capacity = Capacity(runtime, settings)
            self._life_of = Lifecycle(
                runtime, sites, caddy, domains, workers, self.bus, self.names, room, capacity, settings
            )
            idle = await stack.enter_async_context(
                Idle(runtime, sites, caddy, domains, self._life_of, execs.running_in, settings)
            )
            self._health = await stack.enter_async_context(Health(sites, self.bus, settings, caddy.excuse))
            self._deploys = await stack.enter_async_context(
                Deployments(
                    *(runtime, sites, caddy, domains, self.store, self.bus, settings),
                    use=idle.use,
                    admit=room.admit,
                    spacious=room.spacious,
                    promise=capacity.promise,
                    ended=self.names.ended,
                    workers=workers,
                    unwell=self._health.unwell,
                )
            )
            self._notice = (self._deploys.noticed, self._health.noticed, idle.noticed)
            if isinstance(runtime, IncusRuntime):
                pressure = Pressure(runtime, workers.broker, self.bus, settings)
                self._notice += ((await stack.enter_async_context(pressure)).noticed,)
                self.metrics.show_pressure(pressure.counts)
            self._hub = Hub(
                *(runtime, execs, toolbox, files, self.bus, idle, settings),
                *(self.budget, self.places, self._verify, self.grants),
            )
            stack.callback(self.bus.close)
            if importlib.util.find_spec("mcp") is not None:
                from gateway.api.mcp import Mcp  # an extra, and a second of start-up

                self._mcp = await stack.enter_async_context(Mcp(toolbox, settings))
            jobs: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
                "the watch of tenants": partial(self._watch, runtime, workers, files, idempotency),
                "the count of events": partial(self.metrics.follow, self.bus),
                "the measure of the loop": self.metrics.sample_lag,
                "the recovery of deployments": self._recover,
                "the watch of tokens": self.grants.watch,
            }
            if isinstance(runtime, IncusRuntime):
                jobs["the watch of addresses"] = self._pin_ports
                jobs["the kernel's word of memory"] = partial(self._tell_starved, runtime)
            for name, work in jobs.items():
                task = asyncio.create_task(lasting(name, work), name=name)
                stack.push_async_callback(end, task)
            self.bus.publish("gateway.ready", None, {"version": __version__, "runtime": settings.runtime})
            yield
            await self.drain()

    async def _watch(
        self, runtime: TenantRuntime, workers: Workers, files: Files, idempotency: Idempotency
    ) -> None:
        """Publish what happens to tenants, and let go of the files of those that changed."""
        swept = False
        async for event in self.names.watch(runtime):
            if event.type == "gateway.resynced" and not swept:
                swept = True
                with apart("the look for what an earlier gateway left"):
                    await runtime.sweep()
            with apart(f"letting go of what changed with {event.type} of {event.tenant}"):
                await self._let_go(event, workers, files, idempotency)
            if event.type in _STARTED:
                self._started.set()
            facts = self.hub.idle.explained(self.lifecycle.explained(event))
            for notice in self._notice:
                with apart(f"taking notice of {event.type} of {event.tenant}"):
                    notice(event)
            if event.type == "gateway.resynced":
                self._resynced.set()
            told = self.bus.publish(event.type, event.tenant, facts)
            await self.names.took(runtime, event, told)

    async def _let_go(
        self, event: TenantEvent, workers: Workers, files: Files, idempotency: Idempotency
    ) -> None:
        if event.tenant is not None and event.type in _MOVED:
            await workers.forget(event.tenant)
            if event.type == "incus.instance-updated":
                await files.recheck(event.tenant)  # mostly a mere setting
            else:
                await files.forget(event.tenant, event.type.rpartition(".")[2])
        if event.ended is not None:
            self.hub.toolbox.sessions.forget(event.ended)
            try:
                await idempotency.forget_tenant(event.ended)
            except StoreFailed as failed:
                log.warning("receipts of %s are kept: %s", event.ended, failed.message)
            await self.lifecycle.forget(event.ended)
        # not as soon as the old one is destroyed: its last clients may still ask how their commands ended
        if event.tenant is not None and event.type in _MADE:
            self.hub.execs.forget_tenant(event.tenant)

    async def _removed(self, removal: Removal) -> None:
        """Note what the gateway removed by itself: an undo, or what it had made ready."""
        action = "instance.removed" if removal.tenant is None else "tenant.removed"
        facts: dict[str, Any] = {"reason": removal.reason, "instance": removal.instance, "name": removal.name}
        await self.audit.note("gateway", action, removal.tenant, **facts)

    async def _recover(self) -> None:
        """Finish or undo what deployments of an earlier life left, once Incus answers."""
        await self._resynced.wait()
        await self.deploys.recover()

    async def _tell_starved(self, runtime: IncusRuntime) -> None:
        async with contextlib.aclosing(runtime.starved()) as told:
            async for event in told:
                self.bus.publish(event.type, event.tenant, event.data)

    async def _pin_ports(self) -> None:
        """Bind the hardware address of each started tenant to its port, whoever started it; see `pin`."""
        at = self.settings.broker_socket
        while True:
            await self._started.wait()
            self._started.clear()
            try:
                if at is None:
                    await asyncio.to_thread(pin, self.settings)
                else:  # by a connection of its own, for which no file call waits
                    async with contextlib.aclosing(BrokerClient(at=at)) as broker:
                        await broker.request({"do": "chore", "name": "pin"})
            except GatewayError as error:
                log.warning("tenants' addresses could not be bound to their ports: %s", error.message)

    async def drain(self) -> None:
        """Refuse new work, tell clients, end every command, close every stream. Idempotent."""
        if self._drained is None:
            self._drained = asyncio.create_task(self._drain())
        await asyncio.shield(self._drained)

    async def _drain(self) -> None:
        self.draining = True
        hub = self.hub
        self.bus.publish("gateway.draining", None, {"retryAfterMs": RETRY_AFTER_MS})
        for connection in list(hub.connections):
            connection.announce_draining(RETRY_AFTER_MS)
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout / 2):
                await hub.execs.end_all()
        except TimeoutError:
            log.warning("commands did not end in time")
        await self.deploys.end()
        hub.files.end_transfers()
        self.lifecycle.end()
        for connection in list(hub.connections):
            connection.close(CloseCode.DRAINING, "draining")
        self.bus.close()

    def _count_connections(self) -> int:
        return 0 if self._hub is None else len(self._hub.connections)

    def _count_execs(self) -> int:
        return 0 if self._hub is None else self._hub.execs.running

    def _count_contested(self) -> int:
        return 0 if self._domains is None else self._domains.contested

    def _count_shared(self) -> int:
        return 0 if self._domains is None else self._domains.shared

    @property
    def hub(self) -> Hub:
        if self._hub is None:
            raise Unavailable("the gateway is starting")
        return self._hub

    @property
    def deploys(self) -> Deployments:
        if self._deploys is None:
            raise Unavailable("the gateway is starting")
        return self._deploys

    @property
    def health(self) -> Health:
        if self._health is None:
            raise Unavailable("the gateway is starting")
        return self._health

    @property
    def lifecycle(self) -> Lifecycle:
        if self._life_of is None:
            raise Unavailable("the gateway is starting")
        return self._life_of

    # --- who asks -----------------------------------------------------------------------------------

    def _is_revoked(self, token: str) -> bool:
        return token in self.revocations

    def _verify(self, raw: str | None) -> tokens.Token:
        return tokens.verify(self._secret, raw, self._is_revoked)

    def _check_origin(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if not tokens.origin_allowed(
            headers.get("origin"),
            headers.get("host"),
            scope["scheme"],
            self.settings.origins,
            headers.get("x-forwarded-proto"),
        ):
            raise Forbidden("this origin may not ask; list it in GATEWAY_ORIGINS")

    def _token(self, request: Request, scope: str | None) -> tokens.Token:
        """Return who asks; what is in flight of the request is in its share from then on."""
        token = self._known(request)
        if scope is not None:
            token.require(scope)
        ask(request.scope, self.budget.tenant(_whose(token)))
        return token

    def _known(self, request: Request) -> tokens.Token:
        self._check_origin(request.scope)
        return self._verify(_raw_token(request))

    def _tenant_for(self, request: Request, scope: str | None) -> tuple[str, tokens.Token]:
        """Return the tenant of the path, if the token covers it and has `scope`."""
        token = self._known(request)
        name: str = request.path_params["tenant"]
        # one that is not covered answers exactly like one that does not exist
        if not TENANT_NAME.fullmatch(name) or not token.covers(name):
            raise NotFound(f"no tenant {name[:63]}")
        if scope is not None:
            token.require(scope)
        ask(request.scope, self.budget.tenant(name))
        return name, token

    async def _used(self, request: Request, scope: str | None) -> tuple[str, tokens.Token]:
        """Do as `_tenant_for`, and have the tenant awake until the answer to this request has been sent."""
        name, token = self._tenant_for(request, scope)
        request.scope[USES].enter_context(self.hub.idle.using(name))
        await self.hub.idle.awake(name)
        return name, token

    def _still(self, token: tokens.Token) -> None:
        """Return if a token that was good still is. Raises `Unauthorized`."""
        if ended := self.grants.ended(token):
            raise Unauthorized(ended)

    async def _body(self, request: Request, token: tokens.Token) -> bytes:
        """Return the body, which is JSON, if the token has not ended until it was all here."""
        body = await read_body(request, self.settings.max_body, self.settings.body_timeout)
        await weighed(request, body)
        self._still(token)
        return body

    async def _json(self, request: Request, token: tokens.Token) -> Any:
        body = await read_json(request, self.settings.max_body, self.settings.body_timeout)
        self._still(token)
        return body

    def _hold(self, request: Request, token: tokens.Token, end: Callable[[], None]) -> None:
        """Have the answer to this request, which has no end of its own, end when its token does."""
        uses = request.scope[USES]

        def over(why: str) -> None:
            end()
            # who reads nothing would keep the connection for ever
            cut = request.scope.get("state", {}).get(ABORT, lambda: None)
            uses.callback(asyncio.get_running_loop().call_later(_LINGER, cut).cancel)

        uses.enter_context(self.grants.hold(token, over))

    # --- the gateway itself -------------------------------------------------------------------------

    async def _healthz(self, request: Request) -> Response:
        return as_json({"status": "alive"})

    async def _readyz(self, request: Request) -> Response:
        if self.draining:
            raise Unavailable("the gateway is draining", reason="draining")
        await self.hub.runtime.ready()
        if self.journal.failed is not None:
            raise Unavailable(
                f"events cannot be recorded: {self.journal.failed.message}", **self.journal.failed.facts
            )
        return as_json({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type=self.metrics.CONTENT_TYPE)

    async def _session(self, request: Request) -> Response:
        token = self._token(request, None)
        by_header = tokens.bearer_token(request.headers.get("authorization")) is not None
        return as_json(_granted(token, None if by_header else _slot(request)))

    async def _session_open(self, request: Request) -> Response:
        self._check_origin(request.scope)
        body = protocol.validate(
            SessionBody, await read_json(request, _SESSION_MAX, self.settings.body_timeout)
        )
        token = self._verify(body.token)
        response = as_json(_granted(token, body.slot))
        name = tokens.cookie_name(body.slot, secure=_secure(request))
        _set_cookie(request, response, name, body.token, max(0, int(token.expires - time.time())))
        if body.slot is not None:
            others = [slot for slot in tokens.slots(request.headers.get("cookie")) if slot != name]
            for slot in others[: max(0, len(others) + 1 - tokens.MOST_SLOTS)]:
                _set_cookie(request, response, slot, "", 0)
        return response

    async def _session_close(self, request: Request) -> Response:
        self._check_origin(request.scope)
        response = Response(status_code=204)
        _set_cookie(request, response, tokens.cookie_name(_slot(request), secure=_secure(request)), "", 0)
        return response

    # --- tenants ------------------------------------------------------------------------------------

    async def _tenants(self, request: Request) -> Response:
        token = self._token(request, None)
        limit, after = request.query_params.get("limit"), request.query_params.get("after", "")
        if limit is not None and (not limit.isdecimal() or not 0 < int(limit[:6]) <= _PAGE):
            raise InvalidParams(f"limit is a number from 1 to {_PAGE}", field="limit")
        tenants = sorted(
            (t for t in await self.hub.runtime.list() if token.covers(t.name) and t.name > after),
            key=attrgetter("name"),
        )
        shown = tenants if limit is None else tenants[: int(limit)]
        more = {"next": shown[-1].name} if len(shown) < len(tenants) else {}
        return as_json({"tenants": [described(tenant, self.settings) for tenant in shown], **more})

    async def _tenant(self, request: Request) -> Response:
        name, _ = self._tenant_for(request, None)
        tenant = await self.hub.runtime.get(name)
        usage = await self.hub.runtime.metrics(name) if tenant.status == "running" else None
        return as_json(described(tenant, self.settings) | {"usage": usage})

    def _life(self, method: str, scope: str | None, handler: str, status: int) -> Handler:
        """Return the route's handler that asks `Lifecycle` and tells its answer."""

        async def handle(request: Request) -> Response:
            if handler == "logs":
                name, token = await self._used(request, scope)
            else:
                name, token = self._tenant_for(request, scope)
            text = await self._body(request, token)
            try:
                body = orjson.loads(text) if text else {}
            except ValueError:
                raise InvalidParams("the body is not JSON") from None
            ask = Ask(name, request.path_params, request.query_params, body, token)
            facts = {key: request.path_params[key] for key in ("snapshot",) if key in request.path_params}
            work = self.lifecycle.named(handler, body)
            if work == "resize":
                facts["size"] = str(body["size"])[:63]

            async def note(**more: str) -> None:
                given: dict[str, Any] = {"operator": token.operates, **facts, **more}
                await self.audit.note(token.subject, f"tenant.{work}", name, **given)

            try:
                answer = await getattr(self.lifecycle, work)(ask)
            except (Timeout, Unavailable) as error:
                if method == "DELETE":  # it may be gone all the same
                    await note(error=error.code)
                raise
            if method != "GET":
                await note()
            if isinstance(answer, Following):
                self._hold(request, token, answer.end)
                return answer
            response = Response(status_code=status) if answer is None else as_json(answer)
            response.status_code = status
            return response

        return handle

    async def _tenant_metrics(self, request: Request) -> Response:
        name, _ = self._tenant_for(request, None)
        return as_json(await self.hub.runtime.metrics(name))

    async def _site(self, request: Request) -> Response:
        name, _ = self._tenant_for(request, None)
        tenant = await self.hub.runtime.get(name)  # raises where there is none
        return as_json(await self.health.now(tenant.name))

    # --- tools and commands -------------------------------------------------------------------------

    async def _tool(self, request: Request) -> Response:
        toolbox, tool = self.hub.toolbox, request.path_params["tool"]
        name, token = await self._used(request, toolbox.scope(tool))
        arguments = await self._json(request, token)
        if not isinstance(arguments, dict):
            raise InvalidParams("the body is a JSON object: the tool's input")
        session = toolbox.sessions.open(
            name,
            request.headers.get("x-tool-session"),
            protocol.switch(request.headers, "x-read-before-write"),
        )
        call_id = request.headers.get("idempotency-key")
        if call_id is not None and not 0 < len(call_id) <= 200:
            raise InvalidParams("an Idempotency-Key has 1 to 200 characters")
        linger_ms = request.headers.get("x-call-linger")
        if linger_ms is not None and not (linger_ms.isdecimal() and len(linger_ms) < 16):
            raise InvalidParams("X-Call-Linger is a number of milliseconds")
        linger = None if linger_ms is None else int(linger_ms) / 1000
        work = toolbox.call(name, session, tool, arguments, by=token.subject, call_id=call_id, linger=linger)
        result = await unless_gone(request, work)
        if len(result.encoded) > SMALL:  # of what only reads
            hold(request.scope, len(result.encoded))
        return Response(result.encoded, media_type="application/json")

    async def _mcp_endpoint(self, request: Request) -> Response:
        name, token = self._tenant_for(request, None)
        if self._mcp is None:
            missing = NotFound("this gateway serves no MCP: install incus-gateway[mcp] and start it again")
            return problem(missing, 501)
        await self.hub.runtime.get(name)
        await self._used(request, None)
        return _McpAnswer(self._mcp, name, token, await self._body(request, token))

    async def _exec(self, request: Request) -> Response:
        name, token = await self._used(request, "exec")
        if self.draining:
            raise Unavailable("the gateway is draining; ask again soon", retryAfterMs=RETRY_AFTER_MS)
        body = protocol.validate(ExecBody, await self._json(request, token))
        room = request.scope[USES].enter_context(request.scope[SHARE].lease())
        with self.hub.runtime.expect(name):  # who asks once, asks again
            work = run(self.hub.execs, name, body, self.settings, token.subject, room)
            return InParts(await unless_gone(request, work), self.settings.body_timeout)

    async def _wake(self, request: Request) -> Response:
        """Have the site at a domain awake. Caddy asks for its visitors, who need no token to see a site."""
        try:
            await self.hub.idle.visit(request.query_params.get("domain", ""))
        except GatewayError as error:
            text = f"This site was asleep and could not be woken: {error.message}.\n"
            retry = {"Retry-After": str(RETRY_AFTER_MS // 1000)}
            return Response(text, error.http_status, headers=retry, media_type="text/plain")
        return Response(status_code=204)

    # --- files --------------------------------------------------------------------------------------

    async def _file(self, request: Request) -> Response:
        name, _ = await self._used(request, "files:read")
        async with contextlib.AsyncExitStack() as stack:
            source = await stack.enter_async_context(self.hub.files.read(name, file_path(request)))
            return http.Sending(request, source, stack, self.settings.transfer_stall)

    async def _file_put(self, request: Request) -> Response:
        name, token = await self._used(request, "files:write")
        settings, path = self.settings, file_path(request)
        conditions = http.conditions(request.headers)
        still = partial(self._still, token)
        body = http.received(request, settings.upload_max, settings.transfer_stall, still)
        try:
            result = await self.hub.files.write(name, path, body, conditions, by=token.subject)
        except Conflict as error:
            raise http.failed_condition(error) from None
        response = as_json(result)
        response.status_code = 201 if result["created"] else 200
        response.headers["ETag"] = f'"{result["etag"]}"'
        return response

    async def _file_delete(self, request: Request) -> Response:
        name, token = await self._used(request, "files:write")
        recursive = protocol.switch(request.query_params, "recursive")
        given = {"path": file_path(request), "recursive": recursive, **http.conditions(request.headers)}
        try:
            await self.hub.files.call(name, "files/remove", given, by=token.subject)
        except Conflict as error:
            raise http.failed_condition(error) from None
        return Response(status_code=204)

    # --- deployments --------------------------------------------------------------------------------

    async def _templates(self, request: Request) -> Response:
        self._token(request, "deploy")
        return as_json({"templates": await asyncio.to_thread(templates, self.settings)})

    async def _deploy(self, request: Request) -> Response:
        token = self._token(request, "deploy")
        if self.draining:
            raise Unavailable("the gateway is draining; ask again soon", retryAfterMs=RETRY_AFTER_MS)
        body = protocol.validate(DeployBody, await self._json(request, token))
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= 200:
            raise InvalidParams("an Idempotency-Key has 1 to 200 characters")
        record, new = await self.deploys.begin(await asyncio.to_thread(body.request), token, key=key)
        response = as_json({"id": record.id, "tenant": record.tenant, "state": record.state})
        response.status_code = 202 if new or not record.over else 200
        response.headers["Location"] = f"/v1/deployments/{record.id}"
        return response

    async def _deployments(self, request: Request) -> Response:
        token = self._token(request, "deploy")
        found = await self.deploys.recent(token.coverage)
        if token.coverage is not None:
            found = [one for one in found if self.names.is_present(one.tenant, one.created)]
        return as_json({"deployments": [record.to_dict() for record in found]})

    async def _deployment(self, request: Request) -> Response:
        return as_json((await self._deployment_for(request)).to_dict())

    async def _deployment_cancel(self, request: Request) -> Response:
        record = await self._deployment_for(request)
        return as_json((await self.deploys.cancel(record.id)).to_dict())

    async def _deployment_for(self, request: Request) -> Record:
        token = self._token(request, "deploy")
        record = await self.deploys.get(request.path_params["deployment"])
        if not token.covers(record.tenant):
            raise NotFound("no such deployment")
        return record

    async def _events(self, request: Request) -> Response:
        token = self._token(request, "events")
        query = request.query_params
        filter = Filter.parse(token.coverage, query.get("tenant"), query.get("deployment"), query.get("type"))
        filter = replace(filter, since=token.issued)
        last = request.headers.get("last-event-id") or query.get("lastEventId")
        request.scope[USES].callback(self.places.customer(_whose(token)))
        answer = sse.response(self.bus, filter, last, self.settings)
        self._hold(request, token, answer.subscription.close)
        return answer

    # --- the operator -------------------------------------------------------------------------------

    def _operator(self, request: Request) -> tokens.Token:
        """Return the token of whoever may see and end everybody's doing."""
        token = self._token(request, "admin")
        if not token.operates:
            raise Forbidden("this needs a token with the scope admin for every tenant")
        return token

    async def _revoke(self, request: Request) -> Response:
        token = self._operator(request)
        body = protocol.validate(RevokeBody, await self._json(request, token))
        await self.revocations.add(body.id, token.subject)
        ended = [one for one in self.hub.connections if one.token is not None and one.token.id == body.id]
        self.grants.revoke(body.id)
        await self.audit.note(token.subject, "token.revoked", None, operator=True, token=body.id)
        return as_json({"id": body.id, "closed": len(ended)})

    async def _audit(self, request: Request) -> Response:
        self._operator(request)
        query = request.query_params
        limit, before = query.get("limit", "100"), query.get("before")
        if (
            not protocol.NUMBER.fullmatch(limit)
            or not 0 < int(limit) <= 1000
            or not protocol.NUMBER.fullmatch(before or "0")
        ):
            raise InvalidParams("limit is a number up to 1000, and before the id of an entry")
        last = None if before is None else min(int(before), 1 << 62)
        found = await self.audit.entries(int(limit), query.get("tenant"), last)
        return as_json({"entries": found})

    async def _websocket(self, websocket: WebSocket) -> None:
        try:
            self._check_origin(websocket.scope)
        except Forbidden:
            await websocket.close()  # before the accept: the handshake is answered with 403
            return
        name: str = websocket.path_params["tenant"]
        try:
            raw = _raw_token(websocket)
            if self.draining:
                await _refuse(websocket, CloseCode.DRAINING, "draining")
                return
            token = None if raw is None else self._verify(raw)
            if not TENANT_NAME.fullmatch(name) or (token is not None and not token.covers(name)):
                raise NotFound(f"no tenant {name[:63]}")
            if token is not None:
                await self.hub.runtime.get(name)
        except GatewayError as error:
            await _refuse(websocket, CLOSE_CODES.get(type(error), 1011), error.message)
            return
        try:
            await Connection(websocket, name, token, self.hub, address(websocket)).run()
        except RateLimited as full:
            await _refuse(websocket, CloseCode.TOO_MANY, full.message)


class _McpAnswer(Response):
    """What the MCP endpoint answers, written by it."""

    def __init__(self, endpoint: Mcp, tenant: str, token: tokens.Token, body: bytes) -> None:
        self._answer = partial(endpoint.serve, tenant, token, body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


async def _refuse(websocket: WebSocket, code: int, reason: str) -> None:
    # a browser sees a close code only of a connection that was accepted
    offered = websocket.scope.get("subprotocols") or []
    await websocket.accept(protocol.SUBPROTOCOL if protocol.SUBPROTOCOL in offered else None)
    await websocket.close(code, reason[:100])


def _whose(token: tokens.Token) -> str:
    """Return in whose share a request is that names no tenant: the token's only one, or its subject's."""
    coverage = token.coverage
    return next(iter(coverage)) if coverage is not None and len(coverage) == 1 else f"sub {token.subject}"


def _granted(token: tokens.Token, slot: str | None) -> dict[str, Any]:
    return {
        "subject": token.subject,
        "scopes": sorted(token.scopes),
        "tenants": sorted(token.tenants),
        "expires": token.expires,
        "id": token.id,
        "slot": slot,
        "domains": None if token.domains is None else sorted(token.domains),
    }


def _secure(asked: HTTPConnection) -> bool:
    """Say whether a browser asked by https, as whoever terminates TLS tells."""
    scheme = asked.headers.get("x-forwarded-proto", asked.url.scheme)
    return scheme.partition(",")[0].strip().lower() in ("https", "wss")


def _slot(asked: HTTPConnection) -> str | None:
    """Return the session slot that is asked for; websockets, links and EventSource can send no header."""
    return asked.headers.get("x-session-slot") or asked.query_params.get("slot") or None


def _raw_token(asked: HTTPConnection) -> str | None:
    headers = asked.headers
    return tokens.raw_token(
        headers.get("authorization"), headers.get("cookie"), _slot(asked), secure=_secure(asked)
    )


def _set_cookie(asked: HTTPConnection, response: Response, name: str, value: str, age: int) -> None:
    response.set_cookie(
        name, value, max_age=age, httponly=True, samesite="strict", secure=_secure(asked), path="/"
    )
