"""One websocket to the gateway: calls with answers, and the bytes of one command.

Requests run concurrently. The bytes of a command go to the connection's one `Receiver`; while that has no
room, nothing is read from the socket, which slows down the gateway and the command. That is why each command
has its own connection (see `Tenant.exec`): anything else on it would wait too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket as sockets
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from socket import IPPROTO_TCP, SO_KEEPALIVE, SOL_SOCKET
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from gateway_client import wire
from gateway_client.errors import (
    Disconnected,
    GatewayError,
    NotFound,
    RateLimited,
    TooLarge,
    Unauthorized,
    Unavailable,
    from_close,
    from_wire,
)

MiB = 1 << 20

# larger than any answer of a gateway with default limits
MAX_MESSAGE: Final = 64 * MiB
# frames that the websocket library holds before it stops reading: at 32 KiB each, what Incus sends
FRAMES: Final = 16
OPEN_TIMEOUT: Final = 15.0
CLOSE_TIMEOUT: Final = 2.0
# seconds, at most, until a renewal that the gateway had no room for is tried again
RENEW: Final = 1.0
# 30 s of silence, then a probe every 10 s, of which 3 may be lost; not every system has the names
_KEEPALIVE: Final = tuple(
    (getattr(sockets, name), value)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
    if hasattr(sockets, name)
)


@dataclass(frozen=True, slots=True)
class Address:
    """A gateway's address: an http(s) URL, and the Unix socket to reach it through, if any."""

    url: str
    unix: str | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read `http://HOST:PORT`, `https://HOST` or `unix:/PATH`. Raises `ValueError`."""
        if url.startswith("unix:"):
            return cls("http://localhost", "/" + url.removeprefix("unix:").lstrip("/"))
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a gateway's address is http://…, https://… or unix:/…, not {url!r}")
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is not a gateway's address: {error}") from None
        if not parts.hostname:
            raise ValueError(f"{url!r} is not a gateway's address: it has no host")
        return cls(url.rstrip("/"))

    def unanswered(self, error: BaseException) -> Disconnected:
        """Return the error for an address that does not answer, with the system's message if there is one."""
        why = str(error) or type(error).__name__
        if isinstance(error, ssl.SSLError):  # TLS errors have other numbers
            why = f"no TLS with it ({error.reason})"
        elif isinstance(error, OSError) and error.errno is not None and error.errno > 0:
            why = os.strerror(error.errno)
        elif isinstance(error, OSError) and error.strerror:
            why = error.strerror
        return Disconnected(f"no gateway answers at {self.unix or self.url}: {why}")

    def websocket(self, path: str) -> str:
        return "ws" + self.url.removeprefix("http") + path


class Receiver(Protocol):
    """Receives everything of a command on this connection. Called by the reading task only."""

    def frame(self, frame: wire.Frame) -> None: ...

    def notified(self, notification: wire.Notification) -> None: ...

    def broken(self, error: GatewayError) -> None:
        """Nothing more will come."""
        ...

    async def room(self) -> None:
        """Wait until more may come."""
        ...


Accept = Callable[[Any], None]


class Connection:
    """One websocket `gateway.v1`, initialized. Make it by `open`, end it by `close`."""

    def __init__(self, socket: ClientConnection, token: str, *, renewable: bool = False) -> None:
        self.token = token
        self._renewable = renewable
        self._newest = token
        self._renewals: set[asyncio.Task[None]] = set()
        self._socket = socket
        self._ids = itertools.count(1)
        self._pending: dict[int, tuple[asyncio.Future[Any], Accept | None]] = {}
        self._failure: GatewayError | None = None
        self._cancels: set[asyncio.Task[None]] = set()
        self._reader: asyncio.Task[None] | None = None
        self.receiver: Receiver | None = None
        self.server: Mapping[str, Any] = {}
        self.draining = False

    @property
    def failure(self) -> GatewayError | None:
        """The error that ended this connection. A request that raises it may or may not have arrived."""
        return self._failure

    @property
    def alive(self) -> bool:
        """Whether a new request may be tried here."""
        return self._failure is None and not self.draining

    @classmethod
    async def open(
        cls,
        address: Address,
        tenant: str,
        token: str,
        initialize: Mapping[str, Any],
        *,
        patient: bool,
        renewable: bool = False,
    ) -> Connection:
        """Connect and initialize. Raises the typed error of a refusal, `Disconnected` without an answer.

        `patient`: this connection may pause while its receiver has no room. Answers to our pings then wait in
        the socket like everything else, so it is not given up for missing them. `renewable`: there may be
        another token after this one, so that its end is a break like any other.
        """
        options: dict[str, Any] = {"unix": True, "path": address.unix} if address.unix else {}
        try:
            socket = await connect(
                address.websocket(f"/v1/tenants/{tenant}/ws"),
                additional_headers={"Authorization": f"Bearer {token}"},
                subprotocols=[Subprotocol(wire.SUBPROTOCOL)],
                compression=None,
                proxy=None,
                open_timeout=OPEN_TIMEOUT,
                close_timeout=CLOSE_TIMEOUT,
                ping_timeout=None if patient else 20,
                max_size=MAX_MESSAGE,
                max_queue=FRAMES,
                **options,
            )
        except InvalidStatus as error:
            raise refusal(error.response.status_code, bytes(error.response.body or b"")) from None
        except (OSError, TimeoutError, InvalidHandshake, InvalidURI, EOFError) as error:
            raise address.unanswered(error) from error
        tcp = socket.transport.get_extra_info("socket")
        if not address.unix and tcp is not None:
            # a client that waits for a silent command sends nothing: only this finds that the gateway is gone
            tcp.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                tcp.setsockopt(IPPROTO_TCP, option, value)
        connection = cls(socket, token, renewable=renewable)
        connection._reader = asyncio.create_task(connection._read(), name=f"gateway.v1 {tenant}")
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                connection.server = await connection.request("initialize", initialize)
        except TimeoutError:
            await connection.close()
            raise Disconnected("the gateway does not answer initialize") from None
        except BaseException:
            await connection.close()
            raise
        return connection

    async def request(
        self, method: str, params: Mapping[str, Any] | None = None, accept: Accept | None = None
    ) -> Any:
        """Call `method` and return its result. Raises the typed error of the answer, or `Disconnected`.

        `accept` is called with the result by the reading task, before it reads on: what it sets up is
        there when the next frame comes. Cancelling this call cancels it in the gateway too.
        """
        number = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer, accept
        try:
            await self._send(wire.request(number, method, params))
            return await answer
        except asyncio.CancelledError:
            # cancelling a task that awaits a future also cancels the future, which is not an answer
            if self._failure is None and (answer.cancelled() or not answer.done()):
                self._cancel_later(number)
            raise
        finally:
            del self._pending[number]
            if answer.done() and not answer.cancelled():
                answer.exception()  # mark as retrieved: the send may have failed before anybody awaited it

    @property
    def date(self) -> str | None:
        """The gateway's time when it answered the handshake."""
        return None if self._socket.response is None else self._socket.response.headers.get("Date")

    def renew(self, token: str, refused: Callable[[GatewayError], None]) -> None:
        """Send another token; call `refused` if the gateway does not accept it.

        The answer may come behind unread output, and is not awaited. If the gateway has no room, try again
        later, unless there is a newer token by then.
        """
        self._newest = token

        async def renew() -> None:
            while self._newest == token:
                try:
                    await self.request("session/renew", {"token": token})
                except NotFound:
                    return  # an older gateway, which closes no sockets when a token ends
                except RateLimited as full:
                    await asyncio.sleep(min(float(full.facts.get("retry_after", RENEW)), RENEW))
                except GatewayError as error:
                    if error is not self._failure:
                        refused(error)
                    return
                else:
                    self.token = token
                    return

        task = asyncio.create_task(renew())
        self._renewals.add(task)
        task.add_done_callback(self._renewals.discard)

    async def post(self, method: str, params: Mapping[str, Any]) -> None:
        """Call `method` without waiting for its answer, which may come behind unread output."""
        await self._send(wire.request(next(self._ids), method, params))

    async def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """Send a notification, which has no answer."""
        await self._send(wire.notification(method, params))

    async def send(self, stream: wire.StreamId, channel: int, data: bytes) -> None:
        """Send bytes to a command; waits while the gateway does not take them."""
        await self._send(wire.pack_frame(stream, channel, data))

    async def close(self) -> None:
        """Close the connection cleanly, but within two seconds. Idempotent."""
        if self._cancels:  # what was given up must not continue
            await asyncio.wait(self._cancels, timeout=CLOSE_TIMEOUT)
        self._fail(Disconnected("this connection was closed"))
        try:
            await self._socket.close()
        finally:
            tasks = [task for task in (self._reader, *self._cancels, *self._renewals) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, message: str | bytes) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        # the gateway closes the socket of a client that sends more, and with it everything that shares it
        limit = self.server.get("limits", {}).get("maxFrame")
        if limit is not None and (size := _size(message)) > limit:
            words = f"{size} bytes are more than the {limit} that the gateway takes at once"
            raise TooLarge(f"{words}; upload takes a file of any size", size=size, limit=limit)
        try:
            await self._socket.send(message)
        except ConnectionClosed as error:
            raise self._fail(self._closed(error)) from None

    def _cancel_later(self, number: int) -> None:
        # a task that is being cancelled cannot wait for a send any more
        async def cancel() -> None:
            with contextlib.suppress(GatewayError):
                await self._send(wire.cancel_request(number))

        task = asyncio.create_task(cancel())
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _read(self) -> None:
        error: GatewayError = Disconnected("the connection ended")
        try:
            while True:
                message = await self._socket.recv()
                if isinstance(message, str):
                    self._text(wire.decode_server_text(message))
                elif self.receiver is not None:
                    self.receiver.frame(wire.unpack_frame(message))
                    await self.receiver.room()
        except ConnectionClosed as closed:
            error = self._closed(closed)
        except GatewayError as wrong:  # what it sends is not gateway.v1
            error = wrong
            self._socket.transport.abort()
        finally:
            self._fail(error)

    def _text(self, message: wire.Reply | wire.Notification) -> None:
        if isinstance(message, wire.Notification):
            if message.method == "server/draining":
                self.draining = True
            if self.receiver is not None:
                self.receiver.notified(message)
            return
        pending = self._pending.get(message.id) if isinstance(message.id, int) else None
        if pending is None or pending[0].done():
            return
        answer, accept = pending
        if message.error is not None:
            wrong = message.error
            answer.set_exception(from_wire(wrong.code, wrong.message, wrong.facts))
        else:
            if accept is not None:
                accept(message.result)
            answer.set_result(message.result)

    def _closed(self, closed: ConnectionClosed) -> GatewayError:
        frame = closed.rcvd
        if frame is None:
            return Disconnected("the connection broke")
        error = from_close(frame.code, frame.reason)
        if isinstance(error, Unauthorized) and self._renewable and self.server:
            return Disconnected(error.message)
        return error

    def _fail(self, error: GatewayError) -> GatewayError:
        """Keep the first failure and raise it in all waiting calls; return that first one."""
        if self._failure is None:
            self._failure = error
            for answer, _ in self._pending.values():
                if not answer.done():
                    answer.set_exception(error)
            if self.receiver is not None:
                self.receiver.broken(error)
        return self._failure


def refusal(status: int, body: bytes) -> GatewayError:
    """Return the error of a failed HTTP answer; `body` is problem+json if it is the gateway's."""
    try:
        problem = orjson.loads(body)
        facts = {key: value for key, value in problem.items() if key not in _PROBLEM}
        message = problem.get("detail") or problem.get("title") or f"HTTP {status}"
        return from_wire(str(problem["code"]), str(message), facts)
    except (ValueError, KeyError, TypeError, AttributeError):
        by_status = {
            401: "unauthorized",
            403: "forbidden",
            404: "not_found",
            413: "too_large",
            429: "rate_limited",
        }
        if status in by_status:
            return from_wire(by_status[status], f"HTTP {status}")
        return Unavailable(f"HTTP {status}")


# RFC 9457 §3.1, and our own member
_PROBLEM = frozenset({"type", "title", "status", "detail", "instance", "code"})


def _size(message: str | bytes) -> int:
    return len(message) if isinstance(message, bytes) or message.isascii() else len(message.encode())
