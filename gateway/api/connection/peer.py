"""The client of a websocket, and what all connections share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from gateway import protocol
from gateway.admission import Reservation
from gateway.api.connection.client_socket import ClientSocket
from gateway.auth.grants import Grant, Grants
from gateway.auth.tokens import Token
from gateway.errors import (
    Forbidden,
    GatewayError,
    NotFound,
    RateLimited,
    Timeout,
    Unauthorized,
    Unavailable,
)
from gateway.events import Bus, positions
from gateway.execs import Execs
from gateway.files.files import Files
from gateway.history import History
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.idle import Idle
from gateway.limits.budget import Limits
from gateway.protocol import CloseCode
from gateway.runtime import TenantRuntime
from gateway.settings import Settings
from gateway.tasks import begin
from gateway.tools.toolbox import Toolbox, ToolSession

log = logging.getLogger(__name__)

_CLOSE_CODES: Final[Mapping[type[GatewayError], int]] = {
    Unauthorized: CloseCode.UNAUTHORIZED,
    Forbidden: CloseCode.FORBIDDEN,
    NotFound: CloseCode.UNKNOWN_TENANT,
    RateLimited: CloseCode.TOO_MANY,
    Unavailable: CloseCode.TRY_LATER,
    Timeout: CloseCode.TRY_LATER,
}


@dataclass
class Hub:
    """What every connection shares. `verify` turns a raw token into a `Token` or raises `Unauthorized`."""

    runtime: TenantRuntime
    execs: Execs
    toolbox: Toolbox
    files: Files
    history: History
    bus: Bus
    idle: Idle
    settings: Settings
    limits: Limits
    verify: Callable[[str | None], Token]
    grants: Grants
    connections: set[Peer] = field(default_factory=set)
    doors: Doors = field(kw_only=True)
    home: Mapping[str, Any] | None = None
    """Of a cluster's member: what `initialize` tells of it."""

    def resumed(self, tenant: str, last_event_id: str | int | None) -> int | None:
        """Return where in our journal a client resumes a tenant's events."""
        return positions.after(last_event_id, self.bus.member)

    def elsewhere(self, tenant: str) -> None:
        """Raise `Unavailable` if another member of the cluster has a tenant that this one does not have."""


def close_code(error: GatewayError) -> int:
    """Return the code with which an error closes a websocket."""
    return next((code for kind, code in _CLOSE_CODES.items() if isinstance(error, kind)), 1011)


class Peer:
    """One client of one tenant: its token, its place among all sockets, its tasks, its notifications."""

    def __init__(
        self, hub: Hub, tenant: str, token: Token | None, address: str, socket: ClientSocket
    ) -> None:
        """Until there is a `token`, the socket counts towards the client's `address`."""
        self.hub = hub
        self.tenant = tenant
        self.token = token
        self.session: ToolSession | None = None
        self.socket = socket
        self.tasks: set[asyncio.Task[None]] = set()
        self._address = address
        self._place: Reservation[str]
        self._grant: Grant | None = None

    # --- token and place ----------------------------------------------------------------------------

    def take_place(self) -> None:
        """Take a place among all sockets, under the token if there is one. Raises `RateLimited`."""
        if self.token is None:
            self._place = self.hub.limits.strangers.reserve(self._address, displaced=self._displaced)
        else:
            self._place = self.hub.limits.sockets.reserve(self.tenant)

    def _displaced(self) -> None:
        self.close(CloseCode.TOO_MANY, "too many connections without a token; send initialize sooner")

    def become(self, token: Token) -> None:
        """Serve the client under `token`. Raises `RateLimited` if that gives an anonymous client no place."""
        if self.token is None:
            place = self.hub.limits.sockets.reserve(self.tenant)
            self._place.release()
            self._place = place
        self.token = token

    def go_by(self, token: Token) -> None:
        """Close the socket when this token ends, and no longer when the previous one does."""
        if self._grant is None:
            self._grant = self.hub.grants.hold(token, partial(self.close, CloseCode.UNAUTHORIZED))
        else:
            self._grant.renew(token)

    def require(self, scope: str) -> Token:
        """Return the token. Raises `Forbidden` if it lacks the scope."""
        assert self.token is not None  # the wire ensures that initialize came first
        self.token.require(scope)
        return self.token

    def leave(self) -> None:
        """Free its place; the end of its token no longer matters."""
        if self._grant is not None:
            self._grant.close()
        self._place.release()

    # --- notifications ------------------------------------------------------------------------------

    async def tell(self, method: str, params: Mapping[str, Any] | bytes) -> None:
        """Send a notification. `params` given as bytes must be JSON."""
        await self.socket.send(protocol.notification(method, params))

    def tell_soon(self, texts: Sequence[str]) -> None:
        """Send notifications in order, from a task."""
        if texts:
            self.spawn(self._send_all(texts))

    async def _send_all(self, texts: Sequence[str]) -> None:
        for text in texts:
            await self.socket.send(text)

    def announce_draining(self, retry_after_ms: int) -> None:
        """Tell the client that the gateway is about to end."""
        self.tell_soon([protocol.notification("server/draining", {"retryAfterMs": retry_after_ms})])

    def close(self, code: int, reason: str) -> None:
        """Ask for the connection's end with this code. The first reason counts."""
        self.socket.close(code, reason)

    # --- its tasks ----------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that ends with the connection; if the task fails, the connection ends."""
        task = begin(work)
        self.tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of a websocket of %s failed", self.tenant, exc_info=error)
            self.close(1011, "internal error")
