"""Joins a client's websocket and a connection to another gateway: bytes pass both ways, at each end's pace.

Frames are passed on as they are, so close codes, fragments and pings are the far end's own, and nothing is
kept here beyond what two sockets buffer. Of what comes from the far end only the frames' headers are read
(RFC 6455, 5.2), so that something can be said between two of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import orjson
from websockets.frames import DATA_OPCODES, Frame
from websockets.protocol import Protocol, Side, State

from gateway.transport.websocket import LARGE, Lengths, WebSocketProtocol, drop

_HEAD: Final = 64 << 10  # bytes of the far end's answer to the handshake
_LINGER: Final = 5.0  # seconds in which a client must take something of what is left for it
_LOOK: Final = 1.0  # seconds
_ESTABLISHED: Final = 1  # of tcp_states.h, like the next one
CLOSED: Final = 7


class HandshakeRefused(Exception):
    """The far end does not accept the websocket; `answer` is what it said, the head of it first."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(answer[:40])
        self.answer = answer


class ServerEnd(asyncio.Protocol):
    """The connection to the other gateway. Await `accepted` after the handshake was sent."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.accepted: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._head = b""
        self._near: ClientEnd | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not derived of it

    def join(self, near: ClientEnd) -> None:
        """Pass on to this client from now on."""
        self._near = near
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._near is not None:
            self._near.pass_on(data)
            return
        self._head += data
        if self.accepted.done():
            return
        if self._head.startswith(b"HTTP/1.1 101 "):
            if b"\r\n\r\n" in self._head:
                self.transport.pause_reading()
                self.accepted.set_result(self._head)
        elif len(self._head) > _HEAD or (len(self._head) > 12 and self._refused()):
            self.accepted.set_exception(HandshakeRefused(self._head))
            self.transport.abort()

    def _refused(self) -> bool:
        """Return whether the answer that is no acceptance has come whole."""
        head, _end, body = self._head.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name == b"content-length":
                return len(body) >= int(value)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if self._near is not None:
            self._near.far_lost(error)
        elif not self.accepted.done():
            if self._head and not self._head.startswith(b"HTTP/1.1 101 "):
                self.accepted.set_exception(HandshakeRefused(self._head))
            else:
                self.accepted.set_exception(error or ConnectionResetError("the other gateway hung up"))

    def pause_writing(self) -> None:
        if self._near is not None:
            self._near.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._near is not None and not self._near.transport.is_closing():
            self._near.transport.resume_reading()


class ClientEnd(asyncio.Protocol):
    """The client's connection, taken over from `before`. `over` is done when it is closed.

    `sent` is called with what the client sends, until it returns False.
    """

    def __init__(
        self, before: WebSocketProtocol, far: ServerEnd, head: bytes, sent: Callable[[bytes], bool] | None
    ) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport = before.transport
        self._before = before
        self._far = far
        self._sent = sent
        self._frames = Lengths(1 << 62)
        self._last = b""  # what is to be said at the end of the present frame, before the connection ends
        self._ended = False
        self._looking: asyncio.TimerHandle | None = None
        before.give_up()
        self.transport.set_protocol(self)
        head, _, rest = head.partition(b"\r\n\r\n")
        self.transport.write(head + b"\r\n\r\n")
        if rest:
            self.pass_on(rest)
        far.join(self)

    # --- what comes of the client -------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if self._sent is not None and not self._sent(data):
            self._sent = None
        self._far.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        self._stop_looking()
        self._before.connection_lost(error)
        self._far.transport.close() if error is None else self._far.transport.abort()
        if not self.over.done():
            self.over.set_result(None)

    def pause_writing(self) -> None:
        if not self._ended:
            self._far.transport.pause_reading()
            self._looking = asyncio.get_running_loop().call_later(_LOOK, self._look, None)

    def resume_writing(self) -> None:
        self._stop_looking()
        if not self._ended and not self._far.transport.is_closing():
            self._far.transport.resume_reading()

    def _look(self, before: int | None) -> None:
        """See whether the far end has gone while nothing is read of it: nobody else tells.

        If it was reset so is the client, and if it has closed the client must take something.
        """
        state, left = tcp_state(self._far.transport), self.transport.get_write_buffer_size()
        if state == CLOSED or (state != _ESTABLISHED and left == before):
            self._ended = True
            drop(self.transport)
            return
        after, left_then = (_LOOK, None) if state == _ESTABLISHED else (_LINGER, left)
        self._looking = asyncio.get_running_loop().call_later(after, self._look, left_then)

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    # --- what comes of the far end ------------------------------------------------------------------

    def pass_on(self, data: bytes) -> None:
        """Hand the client what the far end sent."""
        if self._ended or self.transport.is_closing():
            return
        if self._last:  # up to the end of this frame, and then no more
            data = data[: self._frames.finish(data)]
        else:
            for _ in self._frames.feed(data):
                pass
        self.transport.write(data)
        if self._last and self._frames.between:
            self._finish()

    def far_lost(self, error: Exception | None) -> None:
        """End, since the far end has: as it did, or with a word if it said none."""
        if self._ended:
            return
        if self._frames.closed or not self._frames.between:
            self._ended = True
            self._part() if error is None else drop(self.transport)
        else:
            self._last = self._last or close_frame(1013, "the tenant's server does not answer")
            self._finish()

    def end(self, *last: bytes) -> None:
        """Say this in frames of its own and end, as soon as the frame that is on its way has passed."""
        if self._ended or self._last:
            return
        self._last = b"".join(last)
        if self._frames.between:
            self._finish()
        else:
            asyncio.get_running_loop().call_later(_LINGER, self._finish)

    def _finish(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._frames.between and not self._frames.closed:
            self.transport.write(self._last)
        self._far.transport.abort()
        self._part()

    def _part(self, before: int | None = None) -> None:
        """Close once the client has taken all, as long as it takes something."""
        if before is None:
            self.transport.close()
        if self.over.done():
            return
        left = self.transport.get_write_buffer_size()
        if left and left == before:
            drop(self.transport)
        else:
            asyncio.get_running_loop().call_later(_LINGER, self._part, left)


def tcp_state(transport: asyncio.BaseTransport | None) -> int:
    """Return the state of a connection also if nothing is read of it; `CLOSED` if it is gone."""
    wire: Any = None if transport is None else transport.get_extra_info("socket")
    try:
        state: int = wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except (AttributeError, OSError):
        return CLOSED
    return state


def close_frame(code: int, reason: str) -> bytes:
    """Return a server's close frame."""
    return _frame(0x88, struct.pack("!H", code) + reason.encode()[:100])


def text_frame(text: str) -> bytes:
    """Return a server's text message of at most 64 KiB."""
    return _frame(0x81, text.encode())


def _frame(kind: int, body: bytes) -> bytes:
    head = bytes([kind, len(body)]) if len(body) < 126 else struct.pack("!BBH", kind, 126, len(body))
    return head + body


class FirstMessage:
    """Reads what a client sends up to the end of its first message, and extracts that message's `params`."""

    def __init__(self, told: Callable[[Mapping[str, Any]], None]) -> None:
        self._told = told
        self._wire = Protocol(Side.SERVER, state=State.OPEN, max_size=LARGE)
        self._text = bytearray()

    def __call__(self, data: bytes) -> bool:
        """Read these bytes; return whether more are needed."""
        self._wire.receive_data(data)
        for frame in self._wire.events_received():
            assert isinstance(frame, Frame)
            if frame.opcode not in DATA_OPCODES:
                continue
            self._text += frame.data
            if frame.fin:
                with contextlib.suppress(ValueError, AttributeError, TypeError):
                    self._told(orjson.loads(self._text).get("params") or {})
                return False
        return self._wire.parser_exc is None and len(self._text) <= LARGE
