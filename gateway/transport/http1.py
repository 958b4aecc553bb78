"""Limits on uvicorn's HTTP connections: how long each may be silent, and how many may be.

uvicorn waits for a request's head forever, and reads the rest of an unwanted body for as long as something
comes. The application itself limits how long it waits for a body that it reads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.settings import Settings
from gateway.transport.websocket import drop

# in a scope's state: cuts the connection, for an answer that must end and is not read
ABORT: Final = "gateway.abort"
# in a scope's state: `HttpProtocol.unbuffered`
UNBUFFERED: Final = "gateway.unbuffered"


class Silent:
    """The connections of which a request's head is awaited, or the rest of a body that is refused.

    Those that last for `head_timeout` are cut, and the oldest of more than `max_silent`.
    """

    def __init__(self, settings: Settings) -> None:
        self._patience = settings.head_timeout
        self._most = settings.max_silent
        self._since: dict[HttpProtocol, float] = {}  # in the order in which they fell silent
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: HttpProtocol) -> None:
        """Count the time from now on, unless it is counted already."""
        if connection in self._since:
            return
        now = connection.loop.time()
        self._since[connection] = now
        if len(self._since) > self._most:
            self._cut(next(iter(self._since)))
        if self._timer is None:
            self._timer = connection.loop.call_at(now + self._patience, self._look)

    def discard(self, connection: HttpProtocol) -> None:
        self._since.pop(connection, None)

    def _look(self) -> None:
        self._timer = None
        for connection, since in list(self._since.items()):
            loop = connection.loop
            if loop.time() < since + self._patience:
                self._timer = loop.call_at(since + self._patience, self._look)
                return
            self._cut(connection)

    def _cut(self, connection: HttpProtocol) -> None:
        self.discard(connection)
        connection.transport.abort()


class HttpProtocol(H11Protocol):
    """uvicorn's own, which is cut where it is silent for too long."""

    silent: Silent
    _made: float  # when the client connected, in the loop's time
    _asked: float  # when the latest request began
    _answered: object  # that request's cycle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._made = self._asked = self.loop.time()
        self._answered = None
        self.app_state = {**self.app_state, ABORT: partial(drop, transport), UNBUFFERED: self.unbuffered}
        self.silent.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.silent.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._listen()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._listen()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self.silent.discard(self)
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

    def asked(self, fresh: float, long: float) -> bool:
        """Return whether an answer is owed that has not begun, and will soon.

        Who came `fresh` seconds ago will ask; what was asked `long` seconds ago takes its time.
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


def protocol(settings: Settings) -> type[HttpProtocol]:
    """Return the class of one server's connections."""
    kind: dict[str, Any] = {"silent": Silent(settings)}
    return type("HttpProtocol", (HttpProtocol,), kind)
