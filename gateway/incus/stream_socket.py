"""Parser and builder of the websocket frames of an exec. No I/O.

Not a general websocket: it trusts its peer, a local daemon, and never answers a ping; see
`gateway.incus.exec_sockets`.

General libraries deliver one message at a time; with incusd's messages of 32 KiB that took more than half of
the gateway's CPU while a command printed (aiohttp 3.14: 600 MB/s, this module: 900, a bare socket: 1 100).
Here all frames of one kernel read become one bytes object, copied once (`frames`). The peer is a local
daemon, so its handshake is not verified.

A stream that is to survive this process is received into a log (`memory`) and has a second descriptor beside
the transport's, to be held.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import os
import secrets
import socket
import struct
import termios
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from gateway.incus.memory import ExecMemory, Log, MemoryFull, Odometer

_CONTINUATION: Final = 0
TEXT: Final = 1
BINARY: Final = 2
CLOSE: Final = 8
_HEADER: Final = 10  # most bytes of a frame header


class Frames:
    """Incremental parser of one socket's frames; the payload is returned as views of the received bytes.

    `ended`: the stream has ended properly; what follows is only what incusd left behind (`StreamSocket.add`).
    `closed`: incusd sent a close frame. `start`: the offset of the first byte. A `log` stores the received
    bytes, and is told where frames begin.
    """

    def __init__(self, log: Log | None = None) -> None:
        self.log = log
        self.rest = b""  # an incomplete header
        self.ended = False
        self.closed = False
        self.start = 0 if log is None else log.start
        self._payload = self.start
        self._left = 0  # bytes of the current frame still to come
        self._wanted = False  # whether those bytes belong to the stream
        self._kind = BINARY

    def feed(self, view: memoryview) -> list[memoryview]:
        """Parse the next received bytes and return the payload among them."""
        pieces: list[memoryview] = []
        if self.rest:
            view = self._split(view)
        while view:
            if self._left:
                piece, view = view[: self._left], view[self._left :]
                self._left -= len(piece)
                if self._wanted:
                    pieces.append(piece)
                    self._payload += len(piece)
                continue
            found = header(view)
            if found is None:
                self.rest = bytes(view)
                break
            self._begin(found, len(view))
            view = view[found[2] :]
        return pieces

    def _split(self, view: memoryview) -> memoryview:
        """Complete a header split between two reads; return the bytes after it."""
        before = len(self.rest)
        joined = self.rest + bytes(view[:_HEADER])
        found = header(memoryview(joined))
        if found is None:
            self.rest = joined
            return view[:0]
        self.rest = b""
        self._begin(found, len(view) + before)
        return view[found[2] - before :]

    def _begin(self, found: tuple[int, int, int], behind: int) -> None:
        """Start the frame with the parsed header `found`, `behind` bytes before the end of received data."""
        kind, self._left, _ = found
        if kind in (TEXT, BINARY):
            self._kind = kind
        self._wanted = kind == BINARY or (kind == _CONTINUATION and self._kind == BINARY)
        self.ended |= kind == TEXT  # incusd sends only empty text frames, each at the end of a stream
        if kind == CLOSE:
            self.closed = True
        if kind == BINARY and self.log is not None:
            self.log.point(self.log.raw - behind, self._payload)


def header(view: memoryview) -> tuple[int, int, int] | None:
    """Parse the frame header at the start of `view`.

    Returns the kind, the payload's length and the header's size in bytes; None if the header is incomplete.
    """
    if len(view) < 2:
        return None
    kind, length = view[0] & 0x0F, view[1] & 0x7F
    if length < 126:
        return kind, length, 2
    size, form = (4, "!H") if length == 126 else (10, "!Q")
    if len(view) < size:
        return None
    return kind, struct.unpack_from(form, view, 2)[0], size


def arrived(data: bytes) -> bytes:
    """Return bytes of a stream as a server's frame, which is not masked."""
    return struct.pack("!BBQ", 0x80 | BINARY, 127, len(data)) + data


def frame(kind: int, data: bytes) -> tuple[bytes, ...]:
    """Return a client frame in non-empty parts; an empty one makes asyncio's `writelines` spin forever.

    A client must mask; with the key 0 the bytes stay unchanged. Masking protects proxies from scripts in
    browsers (RFC 6455 §10.3), and a unix socket has neither.
    """
    length = len(data)
    if length < 126:
        head = struct.pack("!BB", 0x80 | kind, 0x80 | length)
    elif length < 1 << 16:
        head = struct.pack("!BBH", 0x80 | kind, 0x80 | 126, length)
    else:
        head = struct.pack("!BBQ", 0x80 | kind, 0x80 | 127, length)
    head += bytes(4)
    return (head, data) if data else (head,)


KiB = 1 << 10

_HEAD_MAX: Final = 16 * KiB  # most bytes of the handshake's answer
# Unread bytes above which reading pauses. More than one kernel read returns, because pausing and resuming
# are extra system calls, which cost a fast stream a fifth of its speed.
_HIGH: Final = 256 * KiB
_TAKEN: Final = 1024 * KiB  # most bytes `take` reads from the kernel at once; a socket buffers some 208 KiB
# One receive buffer for all sockets: what was read is copied out before any other code runs.
_SHARED: Final = memoryview(bytearray(256 * KiB))


class Lost(Exception):
    """The connection broke before the end of the stream or the wait status arrived."""


class OperationOver(ConnectionRefusedError):
    """Incusd answered, but opened no websocket: the operation that it belongs to is over."""


class FrameSocket(asyncio.BufferedProtocol):
    """The connection below a `StreamSocket`, which is the only one to use it.

    At most one task may read and one may send at a time. Unread output stays with incusd, which eventually
    blocks the command.
    """

    def __init__(self) -> None:
        self._frames = Frames()
        self._transport: asyncio.Transport
        self._upgraded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._head = b""  # the handshake's answer so far
        self._arrived: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._gone = False
        self._wake: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    async def _ask(self, path: str) -> None:
        """Ask for a websocket at that path, and wait until incusd has agreed. Raises `OSError`."""
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        self._transport.write(
            f"GET {path} HTTP/1.1\r\nHost: incus\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        await self._upgraded

    async def read(self) -> bytes:
        """Return the next bytes, b"" at the end of the stream. Raises `Lost` if it breaks."""
        while not self._arrived:
            if self._frames.ended:
                return b""
            if self._gone:
                raise Lost("a stream broke before its end")
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        data = self._arrived.popleft()
        self._size -= len(data)
        if self._paused and self._size < _HIGH:
            self._paused = False
            self._transport.resume_reading()
        return data

    def take(self) -> bytes:
        """Return all bytes that have arrived, including those in the kernel; b"" if none. Does not wait.

        For a reader that has paused: see `gateway.incus.exec_sockets` about pings.
        """
        taken = 0
        while self._paused and not self._gone and not self._frames.ended and taken < _TAKEN:
            descriptor = self._transport.get_extra_info("socket").fileno()
            try:
                size = os.readv(descriptor, [self.get_buffer(-1)])
            except OSError:  # nothing more to read; the transport notices a broken connection by itself
                break
            if not size:
                break
            taken += size
            self.buffer_updated(size)
        data = b"".join(self._arrived)
        self._arrived.clear()
        self._size = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def _send(self, frames: Sequence[bytes]) -> None:
        await self._writable.wait()
        # On a lost connection, `writelines` of CPython 3.13.5 leaves the descriptor registered with the loop
        # forever, even after it is reused.
        if not self._gone and not self._transport.is_closing():
            self._transport.writelines(frames)
            await self._writable.wait()

    @property
    def unsent(self) -> int:
        """Bytes written that incusd has not read yet."""
        if self._gone:
            return 0
        kept = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return int(struct.unpack("i", kept)[0]) + self._transport.get_write_buffer_size()

    def _pause_if_full(self) -> None:
        """Stop receiving if too much is unread."""
        if self._size >= _HIGH and not self._paused and not self._frames.ended:
            self._paused = True
            self._transport.pause_reading()

    # --- asyncio protocol callbacks -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's have no base class

    def get_buffer(self, sizehint: int) -> memoryview:
        log = self._frames.log
        if log is not None:
            try:
                return log.room()
            except MemoryFull:
                self._frames.log = None
        return _SHARED

    def buffer_updated(self, nbytes: int) -> None:
        log = self._frames.log
        view = _SHARED[:nbytes] if log is None else log.landed(nbytes)
        if not self._upgraded.done():
            view = self._upgrade(view)
        self._take_in(view)
        self._pause_if_full()
        self._woken()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._gone = True
        if not self._upgraded.done():
            self._upgraded.set_exception(ConnectionResetError("incusd hung up in the handshake"))
        self._writable.set()  # asyncio never resumes writing on a lost transport
        self._woken()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # --- received data ------------------------------------------------------------------------------

    def _upgrade(self, view: memoryview) -> memoryview:
        """Consume the handshake's answer and return what follows it."""
        before = len(self._head)
        self._head += bytes(view)
        head, end, _ = self._head.partition(b"\r\n\r\n")
        if not end and len(self._head) < _HEAD_MAX:
            return view[:0]
        if not self._upgraded.cancelled():
            if head.startswith(b"HTTP/1.1 101 "):
                view = view[len(head) + len(end) - before :]
                if self._frames.log is not None:
                    self._frames.log.begin(self._frames.log.raw - len(view))
                self._upgraded.set_result(None)
                return view
            status = head[9:12].decode("latin-1")
            self._upgraded.set_exception(OperationOver(f"incusd refused the handshake: {status}"))
        return view[:0]

    def _take_in(self, view: memoryview) -> None:
        pieces = self._frames.feed(view)
        if self._frames.closed:
            self._gone = True
        if pieces:
            data = b"".join(pieces)
            self._arrived.append(data)
            self._size += len(data)

    def _woken(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class StreamSocket(FrameSocket):
    """One connected stream, made by `connect` or `adopted`.

    At most one task may read and one may write at a time. Unread output stays with incusd, which eventually
    blocks the command.
    """

    def __init__(self) -> None:
        super().__init__()
        self.own: socket.socket | None = None

    @classmethod
    async def connect(
        cls, place: Path, path: str, memory: ExecMemory | None = None, area: str | None = None
    ) -> StreamSocket:
        """Open the websocket at `path` of the daemon's socket `place`. Raises `OSError` if incusd refuses.

        With a `memory` the stream can be held; with an `area` of it, received bytes are stored there.
        """
        transport, stream = await asyncio.get_running_loop().create_unix_connection(cls, str(place))
        try:
            if memory is not None:
                stream.own = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
            if memory is not None and stream.own is not None and area is not None:
                odometer = Odometer(stream.own)
                odometer.reset()
                stream._frames = Frames(Log(memory, area, odometer))
            await stream._ask(path)
        except BaseException:
            stream._gone = True
            stream.close()
            raise
        return stream

    @classmethod
    async def adopted(cls, own: socket.socket, log: Log | None) -> StreamSocket:
        """Continue a stream of an earlier process from its log. Takes ownership of `own`.

        Raises `OSError`, and `ValueError` if the log is invalid.
        """
        stream = cls()
        stream.own = own
        stream._upgraded.set_result(None)
        if log is not None:
            stream._frames = Frames(log)
            for view in log.replay():
                stream._take_in(view)
        own.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: stream, sock=own.dup())
        stream._pause_if_full()
        return stream

    @property
    def start(self) -> int:
        """Offset of the first byte `read` returns; not 0 only for a stream of an earlier process."""
        return self._frames.start

    def add(self, data: bytes) -> None:
        """Add bytes to what has arrived, as if incusd had sent them; also after the end of the stream."""
        view = memoryview(arrived(data))
        while view:
            room = self.get_buffer(-1)[: len(view)]
            room[:] = view[: len(room)]
            view = view[len(room) :]
            self.buffer_updated(len(room))

    def keep(self, offset: int) -> int:
        """Drop the log's bytes before an offset, and return the size of the rest in bytes."""
        return 0 if self._frames.log is None else self._frames.log.keep(offset)

    def ended(self) -> None:
        """Mark the log as complete."""
        if self._frames.log is not None:
            self._frames.log.close()

    def forgo(self) -> None:
        """Stop logging: this stream will not be held."""
        self._frames.log = None
        if self.own is not None:
            self.own.close()
            self.own = None

    async def write(self, data: bytes, *, end: bool = False) -> None:
        """Send bytes, waiting while incusd does not read them; `end` signals the end of the stream too.

        Dropped if incusd has hung up.
        """
        await self._send([*frame(BINARY, data), *(frame(TEXT, b"") if end else ())])

    async def write_end(self) -> None:
        """Signal the end of the stream."""
        await self._send(frame(TEXT, b""))

    def close(self) -> None:
        """Hang up, with a close frame unless unsent bytes are in the way. Idempotent."""
        if self.own is not None:
            self.hang_up()
            self.own.close()
            self.own = None
            self._transport.abort()
        elif self._gone or self.unsent:
            self._transport.abort()
        else:
            self._transport.write(b"".join(frame(CLOSE, b"")))
            self._transport.close()
        self._gone = True
        self._writable.set()
        self._woken()

    def leave(self) -> None:
        """Receive nothing more: another process continues with a duplicate of the descriptor."""
        if not self._gone and not self._transport.is_closing():
            if not self._paused:
                self._transport.pause_reading()
            self._paused = False  # nobody resumes it

    def hang_up(self) -> None:
        """Hang up but keep our own descriptor until `close`."""
        if self.own is None:
            self.close()
            return
        # duplicates held elsewhere must be hung up too, and now: the transport would write only later
        with contextlib.suppress(OSError):
            if not self._gone and not self.unsent:
                self.own.send(b"".join(frame(CLOSE, b"")))
            self.own.shutdown(socket.SHUT_RDWR)
        self._gone = True
