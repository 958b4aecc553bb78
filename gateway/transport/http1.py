"""HTTP connections: uvicorn's own with limits, how uvicorn serves our sockets, and the socket for peers.

uvicorn waits for a request's head forever, and reads the rest of an unwanted body for as long as something
comes. The application itself limits how long it waits for a body that it reads.

A connection is a stranger's unless a request of it that has shown a token is being served. There are few
strangers: beyond that the oldest of the address with the most is cut, whatever it waits for. It is also cut
when the gateway is about to run out of descriptors, so that its own work never does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, Final

import h11
import uvicorn
from h11._receivebuffer import ReceiveBuffer, blank_line_regex
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from gateway.admission import Admission, Reservation, descriptors
from gateway.protocol import maxima
from gateway.transport.websocket import WebSocketProtocol, drop

log = logging.getLogger(__name__)

# in a scope's state: cuts the connection, for an answer that must end and is not read
ABORT: Final = "gateway.abort"
# in a scope's state: `HttpProtocol.unbuffered`
UNBUFFERED: Final = "gateway.unbuffered"
# in a scope's state: `HttpProtocol.identified`
IDENTIFIED: Final = "gateway.identified"

HEAD_TIMEOUT: Final = 10.0  # seconds in which a request's head must arrive, as in Caddy
_STRANGERS: Final = 1024  # connections without a token, unless there are few descriptors
_RESERVE: Final = 8  # an eighth of the descriptors is for the gateway's own work
_HEAD_MAX: Final = 64 << 10  # bytes of a head or of trailers: what `maxima` allows, and some short headers

# events of one connection in a turn of the loop, some 4 ms: a body may come in tiny chunks
_TURN: Final = 512


class SilentConnections:
    """The connections of which a request's head is awaited, or the rest of a body that is refused.

    Those that last for `HEAD_TIMEOUT` are cut.
    """

    def __init__(self) -> None:
        self._since: dict[HttpProtocol, float] = {}  # in the order in which they fell silent
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: HttpProtocol) -> None:
        """Count the time from now on, unless it is counted already."""
        if connection in self._since:
            return
        now = connection.loop.time()
        self._since[connection] = now
        if self._timer is None:
            self._timer = connection.loop.call_at(now + HEAD_TIMEOUT, self._look)

    def discard(self, connection: HttpProtocol) -> None:
        self._since.pop(connection, None)

    def _look(self) -> None:
        self._timer = None
        for connection, since in list(self._since.items()):
            loop = connection.loop
            if loop.time() < since + HEAD_TIMEOUT:
                self._timer = loop.call_at(since + HEAD_TIMEOUT, self._look)
                return
            self._cut(connection)

    def _cut(self, connection: HttpProtocol) -> None:
        self.discard(connection)
        connection.transport.abort()


class _Received(ReceiveBuffer):
    """Holds heads and trailers to their maximum also when they come whole, which h11 would parse."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        if len(self) > _HEAD_MAX and blank_line_regex.search(self._data, 0, _HEAD_MAX) is None:
            raise h11.RemoteProtocolError("a head is too long", error_status_hint=431)
        return super().maybe_extract_lines()


class _Http(h11.Connection):
    """Refuses requests whose length is in doubt, as others on the way may take them for two (RFC 9112 §6)."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, _HEAD_MAX)
        self._receive_buffer = _Received()
        self.left = _TURN

    def next_event(self) -> Any:
        if self.left == 0:
            return h11.PAUSED
        self.left -= 1
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = [name for name, _ in event.headers]
            coded = b"transfer-encoding" in names
            if coded and (b"content-length" in names or event.http_version < b"1.1"):
                self._process_error(self.their_role)
                raise h11.RemoteProtocolError("a transfer coding with a length, or in HTTP/1.0")
        return event


class _Flow(FlowControl):
    """Reads nothing while there is `more` to work on of what was read."""

    more = False

    def resume_reading(self) -> None:
        if not self.more:
            super().resume_reading()


class HttpProtocol(H11Protocol):
    """uvicorn's own, which is cut where it is silent for too long or has to make room for others.

    `strangers` counts the connections without a token; it is None where none of them is a stranger's.
    """

    conn: _Http
    flow: _Flow
    silent: SilentConnections
    strangers: Admission[str] | None
    _stranger: Reservation[str] | None = None
    _made: float  # when the client connected, in the loop's time
    _asked: float  # when the latest request began
    _answered: object  # that request's cycle
    _address: str  # the client's, as it counts

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self.conn, self.flow = _Http(), _Flow(transport)
        self._made = self._asked = self.loop.time()
        self._answered = None
        self._address = block(self.client[0] if self.client else "")
        self.app_state = {
            **self.app_state,
            ABORT: partial(drop, transport),
            UNBUFFERED: self.unbuffered,
            IDENTIFIED: self.identified,
        }
        self.silent.add(self)
        # the kernel gives the lowest number that is free, so this is how many are in use at least
        number, most = transport.get_extra_info("socket").fileno(), descriptors()
        if self.strangers is not None and number >= most - most // _RESERVE and not self.strangers.displace():
            transport.abort()
        else:
            self._count()

    def connection_lost(self, exc: Exception | None) -> None:
        self.silent.discard(self)
        self.identified()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._listen()

    def handle_events(self) -> None:
        self.conn.left = _TURN
        super().handle_events()
        if self.conn.left == 0 and not self.flow.more:
            self.flow.more = True
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self.flow.more = False
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        self.handle_events()
        self._listen()
        if self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        if self._stranger is None and not self.transport.is_closing():
            self._count()
        super().on_response_complete()
        self._listen()

    def _count(self, owner: str | None = None) -> None:
        """Count as a stranger from now on, of the client's address unless its proxy names another."""
        if self.strangers is not None:
            owner = self._address if owner is None else owner
            self._stranger = self.strangers.reserve(owner, displaced=self.transport.abort)

    def identified(self) -> None:
        """Count as a stranger no more, until the request that is being served has been answered."""
        if self._stranger is not None:
            self._stranger.release()
            self._stranger = None

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self.silent.discard(self)
        self.identified()  # websockets are counted by themselves
        super().handle_websocket_upgrade(event)

    @contextlib.contextmanager
    def unbuffered(self) -> Iterator[Callable[[memoryview], bool]]:
        """Yield what writes a part of the body of an answer that has begun, without copying it.

        It returns whether the kernel has taken all. If not, the memory must stay as it is until the next
        `send` of the application has returned, which waits for that.
        """
        if not self.transport.is_closing():
            self.transport.set_write_buffer_limits(0)
        try:
            yield self._write
        finally:
            if not self.transport.is_closing():
                self.transport.set_write_buffer_limits()

    def _write(self, part: memoryview) -> bool:
        if self.transport.is_closing():
            return True
        body = h11.Data(data=part)  # type: ignore[arg-type]  # it only counts what it passes through
        for piece in self.conn.send_with_data_passthrough(body) or ():
            self.transport.write(piece)
        return not self.transport.get_write_buffer_size()

    def owes_answer(self, fresh: float, long: float) -> bool:
        """Return whether an answer is owed that has not begun, and will soon.

        Who came `fresh` seconds ago will ask; what was owes_answer `long` seconds ago takes its time.
        """
        if self.transport.get_protocol() is not self:
            return False  # a websocket
        if self.cycle is None:
            return self.loop.time() - self._made < fresh
        owed = not (self.cycle.response_started or self.cycle.response_complete)
        return owed and self.loop.time() - self._asked < long

    def _listen(self) -> None:
        """Count the time of a connection on which nothing is being answered."""
        if self.transport.get_protocol() is not self:
            return  # a websocket
        if self.cycle is None or self.cycle.response_complete:
            # one that rests between two requests uvicorn ends by itself
            if self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
                self.silent.add(self)
        else:
            self.silent.discard(self)
            if self._answered is not self.cycle:
                self._answered, self._asked = self.cycle, self.loop.time()
                if self._stranger is not None and (told := forwarded(dict(self.cycle.scope))) is not None:
                    self.identified()
                    self._count(told)


def protocol() -> type[HttpProtocol]:
    """Return the class of one server's connections."""
    most = min(_STRANGERS, descriptors() // _RESERVE)
    strangers = Admission[str]("connections without a token", each=most + 1, total=most)
    kind: dict[str, Any] = {"silent": SilentConnections(), "strangers": strangers}
    return type("HttpProtocol", (HttpProtocol,), kind)


def identify(scope: Scope) -> None:
    """Count the connection of a request as a stranger's no more until the answer: it counts elsewhere."""
    scope.get("state", {}).get(IDENTIFIED, lambda: None)()


# --- who asks -----------------------------------------------------------------------------------------


def from_this_machine(scope: Scope) -> bool:
    """Return whether a request came from this machine."""
    client, server = scope.get("client"), scope.get("server")
    if client is None:  # a unix socket
        return True
    try:
        address = ip_address(client[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    # a client that has one of this machine's addresses is on it
    return (mapped or address).is_loopback or (server is not None and client[0] == server[0])


def forwarded(scope: Scope) -> str | None:
    """Return the client's address that our own proxy names; None without one."""
    told = Headers(scope=scope).getlist("x-forwarded-for")
    return block(told[-1].rpartition(",")[2].strip()[:64]) if told and from_this_machine(scope) else None


def block(address: str) -> str:
    """Return an address as one owner's: of IPv6 the block of one host."""
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, IPv6Address):
        return str(found.ipv4_mapped or ip_network((found, 64), strict=False))
    return address


# --- servers -------------------------------------------------------------------------------------------


def config(app: ASGIApp, http: type[HttpProtocol], **more: Any) -> uvicorn.Config:
    """Return the configuration of a server for `app`; `more` are uvicorn's own options."""
    return uvicorn.Config(
        app,
        http=http,
        ws=WebSocketProtocol,
        ws_max_size=maxima.FRAME_MAX,
        ws_ping_interval=None,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        **more,
    )


PEER: Final = "gateway.peer"
"""In a scope's state: the client's certificate, as DER."""
_KEEP: Final = 75  # seconds that an unused connection is kept; longer than its client keeps it
_BACKLOG: Final = 256
_ENDING: Final = 2.0  # seconds in which requests notice that nobody waits for them


class SecureServer:
    """A second socket of the same process, with TLS, for clients whose certificate passes `known`."""

    def __init__(self, app: ASGIApp, context: ssl.SSLContext, known: Callable[[bytes], bool]) -> None:
        self._config = config(app, _protocol(known), lifespan="off", timeout_keep_alive=_KEEP)
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
            if isinstance(connection, _PeerConnection):
                connection.shutdown()  # one that is being answered ends after its answer

    async def close(self) -> None:
        """Accept nothing more, and end what is open."""
        self.refuse()
        for connection in list(self._state.connections):
            connection.transport.abort()
        if tasks := list(self._state.tasks):
            await asyncio.wait(tasks, timeout=_ENDING)


class _PeerConnection(HttpProtocol):
    known: Callable[[bytes], bool]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        shown = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        super().connection_made(transport)
        if not shown or not self.known(shown):
            log.warning("refused a connection whose certificate is no peer's")
            transport.abort()
            return
        self.app_state = {**self.app_state, PEER: shown}


def _protocol(known: Callable[[bytes], bool]) -> type[_PeerConnection]:
    kind: dict[str, Any] = {"silent": SilentConnections(), "strangers": None, "known": staticmethod(known)}
    return type("_PeerConnection", (_PeerConnection,), kind)
