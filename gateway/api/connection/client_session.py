"""The client of a websocket: its socket, its token and place among all sockets, its tasks and notifications.

`ClientSocket` takes messages once there is room for them, sends at the client's pace, and closes. It does not
interpret messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway import protocol
from gateway.admission import Reservation
from gateway.api import http
from gateway.auth.grants import Grant, Grants
from gateway.auth.tokens import Token
from gateway.bounds import LEAST_RATE
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
from gateway.limits.budget import ClientLimits, Share
from gateway.protocol import CloseCode
from gateway.runtime import TenantRuntime
from gateway.settings import Settings
from gateway.tasks import begin
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import Toolbox
from gateway.transport.websocket import COMING, FLOW, LARGE, PARTS, SIZE, TEXT

STALL: Final = 600.0  # seconds in which a client must take some output, or it is no longer waited for
_SLOWEST: Final = 16 << 10  # bytes a second that a client must take of a large answer
_GONE: Final = frozenset({1005, 1006})  # RFC 6455 §7.1.5: there is no client to send a code to
_FAREWELL: Final = 2.0  # seconds for a close


@dataclass(frozen=True, slots=True)
class IncomingMessage:
    """One message from the client: `data` if it is binary, else `text`, a large one not yet decoded.

    `lease` counts its bytes.
    """

    text: str | bytes
    data: bytes | None
    size: int
    lease: Reservation[Share]


class Closed(Exception):
    """The connection must be closed with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class ClientSocket:
    """One client's websocket. `share` counts its bytes in flight."""

    def __init__(self, websocket: WebSocket, share: Share) -> None:
        extensions = websocket.scope.get("extensions", {})
        self.share = share
        self._websocket = websocket
        self._parts = PARTS in extensions
        self._flow: Mapping[str, Callable[[], Any]] = extensions.get(FLOW, {})
        self._arriving: deque[Reservation[Share]] = deque()  # for large messages that are arriving
        # since when a channel's output, or a large answer, has waited for the client
        self._waiting: dict[object, float] = {}
        self.closing: asyncio.Future[Closed] = asyncio.get_running_loop().create_future()

    async def accept(self) -> None:
        """Complete the handshake, with our subprotocol if the client offers it."""
        offered = self._websocket.scope.get("subprotocols") or []
        await self._websocket.accept(protocol.SUBPROTOCOL if protocol.SUBPROTOCOL in offered else None)

    # --- receiving ----------------------------------------------------------------------------------

    async def receive(self, *, large: bool) -> IncomingMessage:
        """Return the next message; `large` says whether one over `LARGE` bytes is allowed.

        Raises `WebSocketDisconnect`, or `Closed` for a message that is too large or has stalled.
        """
        while True:
            message = await (self._rest() if self._arriving else self._websocket.receive())
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            if COMING in message:
                await self._admit(message[COMING], large)
                continue
            size = message.get(SIZE, 0)
            lease = self._arriving.popleft() if size > LARGE and self._arriving else self.share.reserve()
            return IncomingMessage(message.get("text", ""), message.get("bytes"), size, lease)

    async def _admit(self, size: int, large: bool) -> None:
        """Accept a large message once there is room for it; nothing more is read until then."""
        if not large:
            raise Closed(
                CloseCode.FRAME_TOO_LARGE, f"a message before initialize is limited to {LARGE} bytes"
            )
        self._arriving.append(await self.share.wait(size))
        self._flow["admit"]()

    async def _rest(self) -> Message:
        """Return the next message, whose remaining bytes must keep arriving."""
        patience = http.BODY_TIMEOUT
        while True:
            received = self._flow["received"]()
            try:
                async with asyncio.timeout(patience):
                    return await self._websocket.receive()
            except TimeoutError:
                if self._flow["received"]() < received + patience * LEAST_RATE:
                    raise Closed(
                        CloseCode.TOO_MANY,
                        f"a message is too slow: under {LEAST_RATE} bytes a second",
                    ) from None

    # --- sending ------------------------------------------------------------------------------------

    async def send(self, text: str) -> None:
        """Send one text message. If the client is gone, this ends the connection."""
        await self._send({"type": "websocket.send", "text": text})

    async def send_answer(self, answer: protocol.Message) -> None:
        """Send an answer. If the client does not take a large one in time, this ends the connection."""
        whole: Message = {"type": "websocket.send"}
        if isinstance(answer, str):
            whole["text"] = answer
        elif self._parts:
            whole["parts"], whole[TEXT] = answer, True
        else:
            whole["text"] = b"".join(answer).decode()
        size = protocol.size(answer)
        if size <= LARGE:
            await self._send(whole)
            return
        key = object()
        self._waiting[key] = asyncio.get_running_loop().time() + size / _SLOWEST
        await self._send(whole)
        self._waiting.pop(key, None)

    async def send_output(self, channel: int, *parts: bytes) -> None:
        """Send a channel's output as one binary message of `parts`. The client must take it in time too."""
        self._waiting.setdefault(channel, asyncio.get_running_loop().time())
        whole = {"parts": parts} if self._parts else {"bytes": b"".join(parts)}
        await self._send({"type": "websocket.send", **whole})
        self._waiting.pop(channel, None)

    async def _send(self, message: Message) -> None:
        try:
            await self._websocket.send(message)
        except (WebSocketDisconnect, RuntimeError):
            # starlette raises RuntimeError for a send after a close
            self.close(1006, "")

    async def watch_stalls(self) -> None:
        """End the connection if a send that must be taken in time takes too long."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(STALL / 4)
            if any(loop.time() - since > STALL for since in self._waiting.values()):
                # a stalled socket cannot be told anything; the client resumes from its offset
                self.close(CloseCode.TOO_MANY, f"no output taken for {STALL:.0f} s")

    # --- the end ------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Ask for the connection's end with this code by resolving `closing`. The first reason counts."""
        if not self.closing.done():
            self.closing.set_result(Closed(code, reason))

    async def say_goodbye(self, code: int, reason: str) -> None:
        """Close the websocket, if the client is still there."""
        if code in _GONE:
            return
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):  # already gone
            async with asyncio.timeout(_FAREWELL):
                await self._websocket.close(code=code, reason=reason[:100])

    def release(self) -> None:
        """Stop counting messages that have not arrived completely."""
        for lease in self._arriving:
            lease.release()


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
    limits: ClientLimits
    verify: Callable[[str | None], Token]
    grants: Grants
    connections: set[ClientSession] = field(default_factory=set)
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


class ClientSession:
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

    def reserve_socket(self) -> None:
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
