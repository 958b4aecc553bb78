"""One websocket of an Incus exec: bytes of a stream in, bytes of a stream out.

A reader of our own, because a stream is all that these sockets carry and each general library hands over a
message at a time: at incusd's 32 KiB a message that cost more than half of the gateway's CPU while a command
printed (aiohttp 3.14: 600 MB/s became 900 beside a bare socket's 1 100). Here the frames of one read of the
kernel become one piece of bytes, copied once. It is no websocket for anything else: it trusts the peer, a
local daemon, with the handshake's echo, and never answers a ping; see `gateway.incus.exec_sockets`.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import os
import secrets
import struct
import termios
from collections import deque
from pathlib import Path
from typing import Final, cast

KiB = 1 << 10

_CONTINUATION, _TEXT, _BINARY, _CLOSE = 0, 1, 2, 8
_HEAD_MAX: Final = 16 * KiB  # of the answer to the handshake
# Bytes unread before the socket is left alone. More than the kernel hands over at once: to leave a socket
# alone and to look at it again are calls of their own, which cost a fast stream a fifth of its speed.
_HIGH: Final = 256 * KiB
_TAKEN: Final = 1024 * KiB  # bytes that `take` takes out of the kernel at once; it holds some 208 KiB
# The kernel writes here, and what it wrote is copied out before anything else runs: one is enough for all.
_SHARED: Final = memoryview(bytearray(256 * KiB))


class Lost(Exception):
    """The daemon or its sockets went away before the stream's end, or a wait status, was seen."""


class StreamSocket(asyncio.BufferedProtocol):
    """One connected stream. Make it by `connect`.

    One task reads and one writes at a time. What is not read stays with incusd, which in time stops the
    command.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._upgraded: asyncio.Future[None] = loop.create_future()
        self._rest = b""  # the start of a header, or of the handshake's answer
        self._left = 0  # bytes of the present frame that are still to come
        self._wanted = False  # whether they belong to the stream
        self._kind = _BINARY
        self._arrived: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._ended = False
        self._gone = False
        self._wake: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    @classmethod
    async def connect(cls, socket: Path, path: str) -> StreamSocket:
        """Open the websocket at `path`. Raises `OSError` if incusd does not take it."""
        transport, stream = await asyncio.get_running_loop().create_unix_connection(cls, str(socket))
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        transport.write(
            f"GET {path} HTTP/1.1\r\nHost: incus\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        try:
            await stream._upgraded
        except BaseException:
            transport.abort()
            raise
        return stream

    async def read(self) -> bytes:
        """Return the next bytes, b"" at the stream's end. Raises `Lost` if it broke off."""
        while not self._arrived:
            if self._ended:
                return b""
            if self._gone:
                raise Lost("a stream broke off")
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        data = self._arrived.popleft()
        self._size -= len(data)
        if self._paused and self._size < _HIGH:
            self._paused = False
            self._transport.resume_reading()
        return data

    def take(self) -> bytes:
        """Return at once all that has come, what the kernel still holds included; b"" if there is none.

        For a reader that lets a stream stand: see `gateway.incus.exec_sockets` about pings.
        """
        taken = 0
        while self._paused and not self._gone and not self._ended and taken < _TAKEN:
            descriptor = self._transport.get_extra_info("socket").fileno()
            try:
                size = os.readv(descriptor, [self.get_buffer(-1)])
            except OSError:  # there is no more; what broke the transport hears for itself
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

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while incusd does not take them. Dropped where it hung up."""
        await self._send(_BINARY, data)

    @property
    def unsent(self) -> int:
        """How many written bytes incusd has not taken."""
        if self._gone:
            return 0
        kept = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return int(struct.unpack("i", kept)[0]) + self._transport.get_write_buffer_size()

    async def write_end(self) -> None:
        """Say that no more bytes come."""
        await self._send(_TEXT, b"")

    def close(self) -> None:
        """Hang up, by a closing frame unless it would wait behind what incusd does not take. Idempotent."""
        if self._gone or self.unsent:
            self._transport.abort()
        else:
            self._transport.write(b"".join(_frame(_CLOSE, b"")))
            self._transport.close()
        self._gone = True
        self._writable.set()
        self._woken()

    async def _send(self, kind: int, data: bytes) -> None:
        await self._writable.wait()
        # On a lost connection the `writelines` of CPython 3.13.5 has the loop watch the descriptor for ever,
        # whosever it is next.
        if not self._gone and not self._transport.is_closing():
            self._transport.writelines(_frame(kind, data))
            await self._writable.wait()

    # --- what the event loop calls ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's derive from nothing

    def get_buffer(self, sizehint: int) -> memoryview:
        kept = len(self._rest)
        _SHARED[:kept] = self._rest
        return _SHARED[kept:]

    def buffer_updated(self, nbytes: int) -> None:
        view = _SHARED[: len(self._rest) + nbytes]
        self._rest = b""
        if not self._upgraded.done():
            view = self._upgrade(view)
        pieces: list[memoryview] = []
        while view and not self._ended:
            if self._left:
                piece, view = view[: self._left], view[self._left :]
                self._left -= len(piece)
                if self._wanted:
                    pieces.append(piece)
                continue
            header = _header(view)
            if header is None:
                self._rest = bytes(view)
                break
            kind, self._left, size = header
            view = view[size:]
            self._begin(kind)
        if pieces:
            data = b"".join(pieces)
            self._arrived.append(data)
            self._size += len(data)
            if self._size >= _HIGH and not self._paused:
                self._paused = True
                self._transport.pause_reading()
        self._woken()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._gone = True
        if not self._upgraded.done():
            self._upgraded.set_exception(ConnectionResetError("incusd hung up in the handshake"))
        self._writable.set()  # asyncio never resumes a writer whose transport is lost
        self._woken()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # --- what was received --------------------------------------------------------------------------

    def _upgrade(self, view: memoryview) -> memoryview:
        """Take the answer to the handshake off the front."""
        head, end, rest = bytes(view).partition(b"\r\n\r\n")
        if not end and len(head) < _HEAD_MAX:
            self._rest = head
        elif head.startswith(b"HTTP/1.1 101 "):
            self._upgraded.set_result(None)
            return memoryview(rest)
        elif not self._upgraded.cancelled():
            status = head[9:12].decode("latin-1")
            self._upgraded.set_exception(ConnectionRefusedError(f"incusd answered the handshake by {status}"))
        return view[:0]

    def _begin(self, kind: int) -> None:
        """Take note of what the frame that begins is."""
        if kind in (_TEXT, _BINARY):
            self._kind = kind
        self._wanted = kind == _BINARY or (kind == _CONTINUATION and self._kind == _BINARY)
        self._ended = kind == _TEXT  # an empty one ends a stream, and there are no others
        if kind == _CLOSE:
            self._gone = True

    def _woken(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def _header(view: memoryview) -> tuple[int, int, int] | None:
    """Return kind, length and own size of the frame header that `view` begins with; None: not all there."""
    if len(view) < 2:
        return None
    kind, length = view[0] & 0x0F, view[1] & 0x7F
    if length < 126:
        return kind, length, 2
    size, form = (4, "!H") if length == 126 else (10, "!Q")
    if len(view) < size:
        return None
    return kind, struct.unpack_from(form, view, 2)[0], size


def _frame(kind: int, data: bytes) -> tuple[bytes, ...]:
    """Return a client's frame in parts, none of them empty: on one asyncio's `writelines` spins for ever.

    A client has to mask; by the key 0 the bytes stay what they are. Masks protect proxies between browsers
    and servers from scripts (RFC 6455 §10.3): on a unix socket there are neither.
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
