"""Makes one ASGI application of the gateway: its routes, its lifespan, and the order of its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gateway import __version__
from gateway.api import background
from gateway.api.http import RETRY_AFTER_MS, for_own_hosts, problem_handler, with_request_id
from gateway.api.routes import ROUTES
from gateway.api.services import Services, opened
from gateway.errors import GatewayError, Unavailable
from gateway.protocol import CloseCode
from gateway.settings import Settings
from gateway.storage.store import Store

log = logging.getLogger(__name__)


class Gateway:
    """One gateway process and the application that serves it.

    Open `store` around serving `app`, so that records which cannot be used end the start with one line.
    """

    def __init__(self, settings: Settings) -> None:
        self.store = Store(settings.state_dir, settings.store_waiting)
        self._settings = settings
        self._services: Services | None = None
        self._drained: asyncio.Task[None] | None = None
        self._leaving = False
        app = Starlette(
            routes=ROUTES,
            lifespan=self._lifespan,
            exception_handlers={
                GatewayError: problem_handler,
                HTTPException: problem_handler,
                ClientDisconnect: problem_handler,
                Exception: problem_handler,
            },
        )
        self.app = with_request_id(for_own_hosts(app, settings), settings.body_timeout)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with opened(self._settings, self.store) as services, background.running(services):
            app.state.services = self._services = services
            facts = {"version": __version__, "runtime": self._settings.runtime}
            services.bus.publish("gateway.ready", None, facts)
            yield
            await self.drain()

    def leave(self) -> None:
        """Have `drain` leave the commands that are held to the next process."""
        self._leaving = True

    async def drain(self) -> None:
        """Refuse new work, tell clients, end every command, close every stream. Idempotent.

        Raises `Unavailable` if the gateway has not come up.
        """
        if self._services is None:
            raise Unavailable("the gateway is starting")
        if self._drained is None:
            self._drained = asyncio.create_task(_drain(self._services, leaving=self._leaving))
        await asyncio.shield(self._drained)


async def _drain(services: Services, *, leaving: bool) -> None:
    services.draining = True
    services.bus.publish("gateway.draining", None, {"retryAfterMs": RETRY_AFTER_MS})
    for connection in list(services.connections):
        connection.announce_draining(RETRY_AFTER_MS)
    if leaving:
        await services.execs.leave()
    try:
        async with asyncio.timeout(services.settings.shutdown_timeout / 2):
            await services.execs.end_all()
    except TimeoutError:
        log.warning("commands did not end in time")
    await services.history.close_turns()
    await services.deployments.end()
    services.files.end_transfers()
    services.site_logs.end()
    for connection in list(services.connections):
        connection.close(CloseCode.DRAINING, "draining")
    services.bus.close()
