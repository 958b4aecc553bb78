"""uvicorn's websocket with bytes in parts, and with a budget that is asked before input is buffered.

Where the scope has the extension `PARTS`, the ASGI message `websocket.send` may carry `parts`: bytes that
make one binary message, or a text one where `TEXT` is true beside them. A command that prints a gigabyte
costs a third less of the gateway's CPU so.

Of a large message the application gets `{"type": "websocket.receive", COMING: SIZE}` as soon as its first
frame's header is there. Nothing more is read of the client until the application has called `admit`, which is
in the scope's extension `FLOW`. Each message that follows has its size in bytes under `SIZE`; the `text` of
one over `LARGE` is bytes, since decoding 16 MiB takes as long as parsing it.

The extension `TAKE` has the protocol itself, for who takes its connection over before the handshake's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from socket import AF_UNIX, SO_LINGER, SOL_SOCKET
from typing import Any, Final

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

PARTS: Final = "gateway.parts"
FLOW: Final = "gateway.flow"
TAKE: Final = "gateway.take"
COMING: Final = "coming"
SIZE: Final = "size"
TEXT: Final = "text parts"
LARGE: Final = 64 << 10  # bytes of a message above which the application is asked first

_WAITING: Final = 8  # messages that wait to be taken while more are read
_SMALL: Final = 16 << 10  # bytes of one such message
_JOINED: Final = 16 << 10  # bytes of an answer: to copy so few costs less than to write it in pieces
_LINGER: Final = 5.0  # seconds in which the peer of a connection that is over must take something
_FAREWELL: Final = 1 << 20  # bytes that a client may still send once the socket is closed
_PIECE: Final = 2 << 10  # bytes of small frames that are looked at before others have their turn
_FRAMES: Final = 200  # frames: each takes some 10 microseconds, whatever it contains
_TURN: Final = 32  # messages, each with some 50 microseconds of work, until others have their turn
_REFUSED: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


class Lengths:
    """Follows the frames' headers in what a client sends (RFC 6455, 5.2), and nothing else of it."""

    def __init__(self, most: int) -> None:
        self.closed = False  # a close frame has begun: nothing may follow it
        self._most = most
        self._head = b""  # the beginning of a header
        self.left = 0  # bytes of the present frame that are still to come
        self._message = 0  # bytes of the present message
        self._told = False
        self.frames = 0  # that have begun

    def feed(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Yield where in `data` a message becomes a large one, and how many bytes it may have."""
        position, end = 0, len(data)
        while position < end:
            if self.left:
                step = min(self.left, end - position)
                self.left -= step
                position += step
                continue
            began = position
            head = self._head + data[position : position + 14 - len(self._head)]
            size = 2 if len(head) < 2 else 2 + _EXTRA.get(head[1] & 127, 0) + (head[1] >> 7) * 4
            if len(head) < max(size, 2):
                self._head = head
                return
            position += size - len(self._head)
            self._head = b""
            length, last, kind = head[1] & 127, head[0] & 128, head[0] & 15
            if length > 125:
                length = int.from_bytes(head[2 : 2 + _EXTRA[length]], "big")
            self.left = length
            self.frames += 1
            if kind > 7:
                self.closed |= kind == 8
                continue
            if kind:
                self._message, self._told = 0, False
            self._message += length
            if self._message > LARGE and not self._told and length <= self._most:
                self._told = True
                # the size of a message in several frames is not known before its last
                yield began, length if last and kind else self._most

    @property
    def between(self) -> bool:
        """Whether no frame is on its way."""
        return not self.left and not self._head

    def finish(self, data: bytes) -> int:
        """Take in what `data` has of the present frame; return how many bytes that are."""
        position = 0
        while position < len(data) and not self.between:
            step = min(self.left, len(data) - position) or 1
            for _ in self.feed(data[position : position + step]):
                pass
            position += step
        return position


_EXTRA: Final = {126: 2, 127: 8}


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's own, which holds back in both directions, `parts`, and `COMING`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lengths = Lengths(self.config.ws_max_size)
        self._sizes: deque[tuple[int, bool]] = (
            deque()
        )  # of the messages in the queue, and which are large texts
        self._asked = 0  # large messages that are not admitted yet
        self._late = self._taken = 0
        self._given_up = False
        self._opening = 0  # bytes of the handshake
        self._later = b""  # what has come and is not looked at yet
        self.received = 0

    async def run_asgi(self) -> None:
        self.scope["extensions"][PARTS] = {}
        self.scope["extensions"][FLOW] = {"admit": self.admit, "received": lambda: self.received}
        self.scope["extensions"][TAKE] = {"protocol": self}
        await super().run_asgi()
        if not self._given_up:
            self.loop.call_later(_LINGER, self._part)

    def hold(self) -> None:
        """Read nothing until `let_go`, before the answer to the handshake."""
        if self.received > self._opening:
            drop(self.transport)  # whoever does not wait for that is no client of ours
        else:
            self.transport.pause_reading()

    def let_go(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def give_up(self) -> None:
        """Say and read nothing any more: another protocol has the connection, and tells of its loss."""
        self._given_up = self.handshake_complete = True

    def shutdown(self) -> None:
        # uvicorn would answer the close of a peer once more, and with that error end without an orderly end
        answered = not self.close_sent and self.conn.state in (State.CLOSING, State.CLOSED)
        if self._given_up or answered:
            self.stop_keepalive()
            self.transport.close()
        else:
            super().shutdown()

    def _part(self, before: int | None = None) -> None:
        """Drop a connection that is over if its peer does not take what is left for it."""
        left = self.transport.get_write_buffer_size()
        if left and left == before:
            drop(self.transport)
        elif left:
            self.loop.call_later(_LINGER, self._part, left)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if not self.handshake_initiated:  # the head, which uvicorn's HTTP hands over by itself
            super().data_received(data)
            self._opening = self.received
            if not self.handshake_initiated:
                # websockets has refused to parse it, and uvicorn would leave it unanswered and open
                self.transport.write(_REFUSED)
                self.transport.close()
            return
        if self._later:
            self._later += data
            return
        self._look_at(data)

    def _look_at(self, data: bytes) -> None:
        """Take in what has come: a piece at a time, and after one of many small frames the rest later."""
        start = 0
        while start < len(data):
            frames, end = self._lengths.frames, start + max(_PIECE, self._lengths.left)
            self._take_in(data[start:end])
            start = end
            many = self.close_sent or self._lengths.frames > frames + _FRAMES  # late ones are not counted
            if many and start < len(data):
                self._later = data[start:]
                self.transport.pause_reading()
                self.loop.call_soon(self._look_on)
                return

    def _look_on(self) -> None:
        later, self._later = self._later, b""
        if not self.transport.is_closing():
            self._look_at(later)
            self._read_on()

    def _take_in(self, data: bytes) -> None:
        if self.close_sent:
            self._late += len(data)
            if self._late > _FAREWELL:
                self.transport.abort()
                return
            super().data_received(data)
            return
        done = 0
        for position, size in list(self._lengths.feed(data)):
            if position > done:
                super().data_received(data[done:position])
            done = position
            self._asked += 1
            coming: Any = {"type": "websocket.receive", COMING: size}  # no message of ASGI's own
            self.queue.put_nowait(coming)
            self.transport.pause_reading()
        super().data_received(data[done:] if done else data)

    def admit(self) -> None:
        """Read on: there is room for the large message that was announced."""
        self._asked -= 1
        self._read_on()

    def _read_on(self) -> None:
        if not (self._asked or self.read_paused or self._later or self.transport.is_closing()):
            self.transport.resume_reading()

    def send_receive_event_to_app(self) -> None:
        # uvicorn stops reading at each message until it is taken, which costs two calls of the kernel: a few
        # small ones may wait instead
        size, waiting = sum(map(len, self.frames)), self.queue.qsize()
        text = size > LARGE and self.curr_msg_data_type == "text"
        if text:
            self.curr_msg_data_type = "bytes"  # so that it is not decoded
        may_wait = not self.read_paused and waiting < _WAITING and size <= _SMALL
        if may_wait:
            self.read_paused = True  # for uvicorn's eyes alone
        super().send_receive_event_to_app()
        if may_wait:
            self.read_paused = False
        if self.queue.qsize() > waiting:
            self._sizes.append((size, text))

    async def receive(self) -> Any:
        self._taken += 1
        if self._taken % _TURN == 0:  # what has arrived already is taken without a wait
            await asyncio.sleep(0)
        message: Any = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._read_on()
        if message["type"] == "websocket.receive" and COMING not in message:
            message[SIZE], text = self._sizes.popleft()
            if text:
                message["text"] = message.pop("bytes")
        return message

    async def send(self, message: Any) -> None:
        parts: Sequence[bytes] | None = message.get("parts")
        if parts is None:
            await super().send(message)
            if message["type"] == "websocket.http.response.body":
                self.handshake_complete = self.close_sent  # else uvicorn takes the denial for no answer
            elif len(message.get("text") or "") > LARGE:
                # until the client has taken it, it counts as in flight
                await self.writable.wait()
            elif message["type"] == "websocket.close":
                self._asked = 0
                self._read_on()
            return
        await self.writable.wait()
        if self.disconnected or self.close_sent or self.transport.is_closing():
            raise ClientDisconnected
        length, text = sum(map(len, parts)), message.get(TEXT, False)
        kind = 0x81 if text else 0x82
        if length < 126:
            head = struct.pack("!BB", kind, length)
        elif length < 1 << 16:
            head = struct.pack("!BBH", kind, 126, length)
        else:
            head = struct.pack("!BBQ", kind, 127, length)
        if length <= _JOINED:
            self.transport.write(b"".join((head, *parts)))
        else:
            self.transport.writelines([head, *parts])
        if text and length > LARGE:
            await self.writable.wait()  # until the client has taken it, it counts as in flight


def drop(transport: asyncio.Transport) -> None:
    """Cut a connection, with what was not sent yet: the kernel would go on offering that to its peer."""
    wire = transport.get_extra_info("socket")
    if wire is not None and wire.family != AF_UNIX:
        with contextlib.suppress(OSError, ValueError):  # it is closed already
            wire.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
