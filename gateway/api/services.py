"""The services that the routes and websockets of a gateway use."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Final, Protocol
from urllib.parse import parse_qs

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.connection import Hub
from gateway.api.mcp_loading import McpEndpoint
from gateway.api.metrics import Metrics
from gateway.api.preview import Previews
from gateway.audit import AuditLog
from gateway.auth import tokens
from gateway.auth.grants import Revocations
from gateway.caddy import Caddy
from gateway.deployments import Deployer, Health
from gateway.deployments.context import RemoteRoutes
from gateway.deployments.publishing import Sources
from gateway.events import Filter, StoredJournal, sse
from gateway.idempotency import Idempotency
from gateway.lifecycle.lifecycle import Lifecycle
from gateway.lifecycle.site_logs import SiteLogs
from gateway.limits.capacity import Capacity, DiskSpace
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains
from gateway.ownership.names import Names
from gateway.ownership.reservations import Reservations
from gateway.rootfs.workers import Workers
from gateway.runtime import TENANT_NAME
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.local import LocalRuntime
from gateway.runtime.sites import Sites
from gateway.settings import Settings
from gateway.storage.store import Store

EXTENSIONS: Final = "incus_gateway.extensions"
"""The group of entry points by which a package on top of the gateway registers its `Extension`."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a request is about, by its head: a `tenant`, a `deployment`, or `events` of several tenants."""

    kind: str
    name: str

    @classmethod
    def of(cls, scope: Scope) -> Subject | None:
        """Return the subject of a request; None for a request that is about neither."""
        match scope["path"].split("/", 4):
            case ["", "v1", "tenants", name, *_] if name:
                return cls("tenant", name)
            case ["", "v1", "deployments", name] if name:
                return cls("deployment", name)
            case ["", "v1", "events"]:
                query = parse_qs(scope["query_string"].decode("latin-1"))
                tenant, deployment = (query.get(name, [""])[-1] for name in ("tenant", "deployment"))
                if deployment and not tenant and "," not in deployment:
                    return cls("deployment", deployment)
                return cls("tenant" if TENANT_NAME.fullmatch(tenant) else "events", tenant)
        return None

    def by(self, token: tokens.Token) -> Subject:
        """Return the subject as a token sees it: a token of one tenant covers only that tenant's events."""
        only = token.coverage
        if self.kind == "events" and not self.name and only is not None and len(only) == 1:
            return Subject("tenant", next(iter(only)))
        return self


class TenantHome(Protocol):
    """Another server that is, or will be, a tenant's home."""

    def answer(self, request: Request, body: bytes, path: str | None = None) -> Response:
        """Return that server's answer to a request with this body; `path` replaces the request's own."""
        ...


@dataclass(frozen=True, slots=True)
class OtherAnswers:
    """The other servers' answers to a request, and the names of those that gave none; None for one server."""

    answers: Sequence[Any] = ()
    silent: Sequence[str] | None = None

    def entries(self, key: str) -> Iterable[dict[str, Any]]:
        """Yield the entries of all their lists."""
        for answer in self.answers:
            yield from answer[key]

    @property
    def unanswered(self) -> Mapping[str, Any]:
        """What a merged answer says about servers that did not answer."""
        return {} if self.silent is None else {"unanswered": self.silent}


class Topology:
    """Where tenants live: all of them here. An `Extension` that knows of other servers overrides this."""

    member: str = ""
    """The name of this server among the others."""
    home: Mapping[str, Any] | None = None
    """What `initialize` tells clients of this server, so that they can connect to it directly."""
    domains: Reservations | None = None
    """Decides which tenant has a domain, where this server cannot decide that alone."""

    async def settle(self) -> None:
        """Return once the other servers are known, or after a while."""

    async def secret(self, settings: Settings) -> str:
        """Return the secret that signs tokens."""
        return tokens.load_secret(settings)

    async def share_revocations(self, revocations: Revocations, end: Callable[[str], int]) -> None:
        """Keep revocations the same on all servers; `end` ends what is open under a token."""

    async def share_sites(self, caddy: Caddy, secret: str) -> None:
        """Have Caddy answer the other servers' Caddys."""
        caddy.leave()

    def remote_routes(self, caddy: Caddy, domains: Domains) -> RemoteRoutes | None:
        """Return what knows the routes to other servers' sites."""
        return None

    def moving(self, tenant: str) -> bool:
        """Return whether a tenant is moving to another server."""
        return False

    @contextlib.asynccontextmanager
    async def attached(self, services: Services, store: Store) -> AsyncIterator[None]:
        """Use this gateway's services while the context is open."""
        yield

    def jobs(self) -> Mapping[str, Callable[[], Coroutine[Any, Any, None]]]:
        """Return work that runs as long as the gateway, by its names in the log."""
        return {}

    def serving(self, store: Store, app: ASGIApp) -> contextlib.AbstractAsyncContextManager[None]:
        """Serve `app` to the other servers while the context is open."""
        return contextlib.nullcontext()

    async def answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request by `app`, or by the server that has its tenant."""
        await app(scope, receive, send)

    def changed(self) -> None:
        """Note that a tenant of this server has changed."""

    def check_here(self, tenant: str) -> None:
        """Raise `Unavailable` if another server has this tenant."""

    async def place(self, request: Request, tenant: str, *, here: bool = False) -> TenantHome | None:
        """Return the other server that is, or will be, a tenant's home; None if it is this one.

        `here` says that the request is also about another tenant, which is here: a new one is then created
        here too. The token must cover the tenant. Raises `Unavailable` if this cannot be decided.
        """
        return None

    async def ask_others(self, request: Request) -> OtherAnswers:
        """Ask the other servers the same question."""
        return OtherAnswers()

    def absent(self, token: tokens.Token, others: OtherAnswers) -> Iterable[dict[str, Any]]:
        """Yield the tenants of servers that did not answer, and those that are moving."""
        return ()

    def described(self, tenant: str) -> Mapping[str, Any]:
        """Return what else there is to say about a tenant of this server."""
        return {}

    async def revoke(self, token: str) -> Mapping[str, Any]:
        """Revoke a token on the other servers; return what the answer says of it besides."""
        return {}

    def tenant_of(self, request: Request, token: tokens.Token) -> str | None:
        """Return the tenant whose events a request asks for, None if there may be several."""
        subject = Subject.of(request.scope)
        if subject is None or (subject := subject.by(token)).kind != "tenant":
            return None
        return subject.name

    async def events(
        self, request: Request, token: tokens.Token, filter: Filter, last_event_id: str | None
    ) -> sse.Streaming | None:
        """Return a stream of several servers' events, None if this server's are all."""
        return None

    async def rest(self, seconds: float) -> None:
        """Begin no more moves and wait for those under way. Raises `Unavailable` if that takes longer."""

    def go_on(self) -> None:
        """Let moves begin again."""

    async def hand_over(self) -> None:
        """Leave moves to the next process, as they are."""

    def end_clients(self, retry_after_ms: int, why: str) -> None:
        """Tell clients of other servers' tenants that this gateway ends."""


class Extension(Protocol):
    """A package on top of the gateway, as its entry point names it."""

    routes: Sequence[BaseRoute]

    def opened(
        self, settings: Settings, runtime: IncusRuntime | LocalRuntime
    ) -> contextlib.AbstractAsyncContextManager[Topology | None]:
        """Open what needs no records; None where the extension has nothing to do."""
        ...


@cache
def extensions() -> Sequence[Extension]:
    """Return the registered extensions."""
    return [point.load() for point in entry_points(group=EXTENSIONS)]


@contextlib.asynccontextmanager
async def topology(settings: Settings, runtime: IncusRuntime | LocalRuntime) -> AsyncIterator[Topology]:
    """Open the topology of the first extension that has one, or else that of a single server."""
    async with contextlib.AsyncExitStack() as stack:
        for extension in extensions():
            if (found := await stack.enter_async_context(extension.opened(settings, runtime))) is not None:
                yield found
                return
        yield Topology()


@dataclass(kw_only=True)
class Services(Hub):
    """Everything that lives as long as the gateway. Websockets see the part in `Hub`.

    `secret` signs tokens. `end_token` ends what is open under a token, by its id, and returns how many
    websockets that closed. `pressure` is None on the local runtime, `mcp` if that extra is not installed.
    """

    secret: str = field(repr=False)
    journal: StoredJournal
    idempotency: Idempotency
    revocations: Revocations
    end_token: Callable[[str], int]
    names: Names
    audit: AuditLog
    workers: Workers
    domains: Domains
    capacity: Capacity
    room: DiskSpace
    lifecycle: Lifecycle
    site_logs: SiteLogs
    health: Health
    deployments: Deployer
    sources: Sources
    pressure: Pressure | None
    metrics: Metrics
    mcp: McpEndpoint | None
    leave_ready: Callable[[], None]  # leaves what is ready for new tenants to the next process
    sites: Sites
    previews: Previews
    topology: Topology
    draining: bool = False

    def resumed(self, tenant: str, last_event_id: str | int | None) -> int | None:
        return self.names.position(tenant, last_event_id)

    def elsewhere(self, tenant: str) -> None:
        self.topology.check_here(tenant)


def services(asked: HTTPConnection) -> Services:
    """Return the services of a request's or websocket's gateway."""
    found: Services = asked.app.state.services
    return found
