"""A second socket of the same process, by TLS, for those whose certificate is known."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final

from starlette.types import ASGIApp
from uvicorn.server import ServerState

from gateway.settings import Settings
from gateway.transport import http1, options

log = logging.getLogger(__name__)

PEER: Final = "gateway.peer"
"""In a scope's state: the client's certificate, as DER."""
_KEEP: Final = 75  # seconds that an unused connection is kept; longer than its client keeps it
_BACKLOG: Final = 256
_ENDING: Final = 2.0  # seconds in which requests notice that nobody waits for them


class SecureServer:
    """Serves `app` to those whose certificate `context` trusts and `known` says yes to."""

    def __init__(
        self, app: ASGIApp, settings: Settings, context: ssl.SSLContext, known: Callable[[bytes], bool]
    ) -> None:
        self._config = options.config(
            app, settings, _protocol(settings, known), lifespan="off", timeout_keep_alive=_KEEP
        )
        self._context = context
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept connections from now on; return where. Raises `OSError`."""
        self._config.load()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._connection, host, port, ssl=self._context, backlog=_BACKLOG, reuse_address=True
        )
        wire: socket.socket = self._server.sockets[0]
        found = wire.getsockname()
        return str(found[0]), int(found[1])

    def _connection(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self._config.http_protocol_class(  # type: ignore[call-arg]  # uvicorn's own
            config=self._config, server_state=self._state, app_state={}
        )
        return made

    def refuse(self) -> None:
        """Accept nothing more, neither connections nor requests on those there are."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._state.connections):
            if isinstance(connection, _Connection):
                connection.shutdown()  # one that is being answered ends after its answer

    async def close(self) -> None:
        """Accept nothing more, and end what is open."""
        self.refuse()
        for connection in list(self._state.connections):
            connection.transport.abort()
        if tasks := list(self._state.tasks):
            await asyncio.wait(tasks, timeout=_ENDING)


class _Connection(http1.HttpProtocol):
    known: Callable[[bytes], bool]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        shown = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        super().connection_made(transport)
        if not shown or not self.known(shown):
            log.warning("refused a connection whose certificate is no peer's")
            transport.abort()
            return
        self.app_state = {**self.app_state, PEER: shown}


def _protocol(settings: Settings, known: Callable[[bytes], bool]) -> type[_Connection]:
    kind: dict[str, Any] = {"silent": http1.Silent(settings), "strangers": None, "known": staticmethod(known)}
    return type("_Connection", (_Connection,), kind)
