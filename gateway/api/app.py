"""The gateway as one ASGI application: its routes, its lifespan, and the order of its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from gateway import __version__
from gateway.api import background
from gateway.api.assembly import Prepared, opened, prepared
from gateway.api.http import RETRY_AFTER_MS, at_the_edge, for_listed_origins, problem_handler, with_request_id
from gateway.api.routes import ROUTES
from gateway.api.services import Services, extensions
from gateway.errors import GatewayError, Unavailable
from gateway.protocol import CloseCode
from gateway.settings import Settings
from gateway.storage.store import Store

log = logging.getLogger(__name__)

_NEXT_MS: Final = 50  # milliseconds until clients may reconnect, if the next process is ready
_BRIEF: Final = 0.05  # seconds to end things in a handover, while clients wait
_SEEN: Final = 0.25  # seconds for a successor to see its tenants


def routes() -> list[BaseRoute]:
    """Return the application's routes, including those of extensions."""
    return [*ROUTES, *(route for extension in extensions() for route in extension.routes)]


class Gateway:
    """One gateway process and the application that serves it.

    Open `store` around serving `app`, so that unusable records end the start with one line.
    """

    def __init__(self, settings: Settings) -> None:
        self.store = Store(settings.state_dir)
        self._settings = settings
        self._services: Services | None = None
        self._background: background.BackgroundJobs | None = None
        self._ready: Prepared | None = None
        self._skip: Sequence[str] = ()
        self._drained: asyncio.Task[None] | None = None
        self._leaving = False
        app = Starlette(
            routes=routes(),
            lifespan=self._lifespan,
            exception_handlers={
                GatewayError: problem_handler,
                HTTPException: problem_handler,
                ClientDisconnect: problem_handler,
                Exception: problem_handler,
            },
        )

        async def routed(scope: Scope, receive: Receive, send: Send) -> None:
            if self._services is None:
                await app(scope, receive, send)
            else:
                await self._services.topology.answer(app, scope, receive, send)

        public = at_the_edge(for_listed_origins(routed, settings.origins), settings)
        self.app = with_request_id(public)
        self._relayed = with_request_id(routed)  # by peers, who asked for the host

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        if self._ready is not None:
            self._ready.runtime.changes.skip(self._skip)
        async with (
            opened(self._settings, self.store, self._ready) as services,
            background.running(services) as self._background,
            services.topology.serving(self.store, self._relayed),
        ):
            app.state.services = self._services = services
            facts = {"version": __version__, "runtime": self._settings.runtime}
            services.bus.publish("gateway.ready", None, facts)
            if self._ready is not None:
                await self._background.seen(_SEEN)
            yield
            await self.drain()

    # --- taking over from another process -----------------------------------------------------------

    @contextlib.asynccontextmanager
    async def prepared(self, tenants: Sequence[str]) -> AsyncIterator[None]:
        """Prepare to serve, with warm shells for these tenants, while another process has the records.

        Must stay open while serving. Raises `Unavailable` if this gateway could not serve.
        """
        await self.store.check()
        async with prepared(self._settings) as ready:
            await ready.runtime.prepare(tenants)
            await ready.workers.broker.prepare()
            await ready.topology.settle()
            self._ready = ready
            yield

    def skip(self, told: Sequence[str]) -> None:
        """Do not publish the runtime's events with these marks: the previous process has done so."""
        self._skip = told

    # --- handing over to another process ------------------------------------------------------------

    @property
    def tenants(self) -> Sequence[str]:
        """The tenants with connected clients."""
        found = () if self._services is None else self._services.connections
        return sorted({peer.tenant for peer in found})

    async def rest(self, seconds: float, waiting: Callable[[int], None]) -> None:
        """Wait until no deployment, move or slow Write is under way and all turns' changes are recorded.

        No deployment begins from then on. Raises `Unavailable` if some take longer than `seconds`.
        """
        await self._up.history.close_turns()
        await self._up.topology.rest(seconds)
        await self._up.deployments.rest(seconds, waiting)
        await self._up.toolbox.rest()

    def go_on(self) -> None:
        """Let deployments and moves begin again, since no process takes over."""
        self._up.deployments.go_on()
        self._up.topology.go_on()

    async def hand_over(self) -> Sequence[str]:
        """Release clients, commands and records; return the marks of the runtime's published events.

        What the next process does not need is ended later, by `drain`.
        """
        self._leaving = True
        services = self._up
        assert self._background is not None and self._drained is None
        self._drained = asyncio.create_task(_hand_over(services, self._background, self.store))
        await asyncio.shield(self._drained)
        return services.runtime.changes.told

    # --- the end ------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Let `drain` leave the held commands to the next process."""
        self._leaving = True

    async def drain(self) -> None:
        """Refuse new work, tell clients, end every command, close every stream. Idempotent.

        Raises `Unavailable` if the gateway has not started.
        """
        services = self._up
        if self._drained is None:
            self._drained = asyncio.create_task(_drain(services, leaving=self._leaving))
        await asyncio.shield(self._drained)

    @property
    def _up(self) -> Services:
        if self._services is None:
            raise Unavailable("the gateway is starting")
        return self._services


async def _drain(services: Services, *, leaving: bool) -> None:
    _announce(services, RETRY_AFTER_MS)
    if leaving:
        services.leave_ready()
        await services.toolbox.leave()
        await services.execs.leave()
    try:
        async with asyncio.timeout(services.settings.shutdown_timeout / 2):
            await services.execs.end_all()
    except TimeoutError:
        log.warning("commands did not end in time")
    await services.history.close_turns()
    await services.deployments.end()
    _end_clients(services, RETRY_AFTER_MS, "draining")
    services.bus.close()


async def _hand_over(services: Services, background: background.BackgroundJobs, store: Store) -> None:
    """Like `_drain`, but quickly: the next process waits for the records, and clients wait for it."""
    _announce(services, _NEXT_MS)
    store.hurry()
    services.leave_ready()
    await services.toolbox.leave()
    await services.execs.leave()
    # what no process outlives; the next process ends what does not end in time
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_BRIEF):
            await services.execs.end_all()
    await services.runtime.leave()
    await services.topology.hand_over()
    await services.deployments.end()
    _end_clients(services, _NEXT_MS, "another process takes over")
    background.cancel()
    await asyncio.sleep(0)  # announcements go out first, and the background stops
    services.bus.close()
    await services.journal.close(handing_over=True)
    await services.audit.close()
    await store.close()


def _end_clients(services: Services, retry_after_ms: int, why: str) -> None:
    """End what clients still have open; they may come back after that time."""
    services.files.end_transfers()
    services.site_logs.end()
    for connection in list(services.connections):
        connection.close(CloseCode.DRAINING, why)
    services.topology.end_clients(retry_after_ms, why)


def _announce(services: Services, retry_after_ms: int) -> None:
    services.draining = True
    services.bus.publish("gateway.draining", None, {"retryAfterMs": retry_after_ms})
    for connection in list(services.connections):
        connection.announce_draining(retry_after_ms)
