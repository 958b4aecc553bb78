"""One websocket to incusd as frames: its handshake, what arrives, what is sent, back-pressure both ways.

General libraries deliver one message at a time; with incusd's messages of 32 KiB that took more than half of
the gateway's CPU while a command printed (aiohttp 3.14: 600 MB/s, this module: 900, a bare socket: 1 100).
Here all frames of one kernel read become one bytes object, copied once (`frames`). The peer is a local
daemon, so its handshake is not verified.
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
from collections.abc import Sequence
from typing import Final, cast

from gateway.incus.frames import Frames
from gateway.incus.memory import MemoryFull

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


class HandshakeRefused(ConnectionRefusedError):
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
            self._upgraded.set_exception(HandshakeRefused(f"incusd refused the handshake: {status}"))
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
