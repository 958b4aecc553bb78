"""One websocket of an Incus exec: bytes of a stream in, bytes of a stream out.

A reader of our own, because a stream is all that these sockets carry and each general library hands over a
message at a time: at incusd's 32 KiB a message that cost more than half of the gateway's CPU while a command
printed (aiohttp 3.14: 600 MB/s became 900 beside a bare socket's 1 100). Here the frames of one read of the
kernel become one piece of bytes, copied once (`frames`). It trusts the peer, a local daemon, with the
handshake's echo. A stream that is to outlive this process is received into a log (`memory`), and has a
descriptor of its own beside the transport's, for whoever holds it.
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
from pathlib import Path
from typing import Final, cast

from gateway.incus.frames import BINARY, CLOSE, TEXT, Frames, frame
from gateway.incus.memory import Full, Log, Memory, Odometer

KiB = 1 << 10

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
        self.own: socket.socket | None = None
        self._frames = Frames()
        self._transport: asyncio.Transport
        self._upgraded: asyncio.Future[None] = loop.create_future()
        self._head = b""  # of the handshake's answer
        self._arrived: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._gone = False
        self._wake: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    @classmethod
    async def connect(
        cls, place: Path, path: str, memory: Memory | None = None, area: str | None = None
    ) -> StreamSocket:
        """Open the websocket at `path` of the daemon at `place`. Raises `OSError` if incusd does not take it.

        With a `memory` it can be held, and with an `area` of that what comes is received there.
        """
        transport, stream = await asyncio.get_running_loop().create_unix_connection(cls, str(place))
        try:
            if memory is not None:
                stream.own = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
            if memory is not None and stream.own is not None and area is not None:
                odometer = Odometer(stream.own)
                odometer.reset()
                stream._frames = Frames(Log(memory, area, odometer))
            key = base64.b64encode(secrets.token_bytes(16)).decode()
            transport.write(
                f"GET {path} HTTP/1.1\r\nHost: incus\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
            )
            await stream._upgraded
        except BaseException:
            stream._gone = True
            stream.close()
            raise
        return stream

    @classmethod
    async def adopted(cls, own: socket.socket, log: Log | None) -> StreamSocket:
        """Go on with a stream of an earlier process, by what it left in its log.

        Takes `own` over. Raises `OSError`, and `ValueError` for what no process of ours left.
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
        if stream._size >= _HIGH and not stream._paused:
            stream._paused = True
            stream._transport.pause_reading()
        return stream

    @property
    def start(self) -> int:
        """The offset of the first byte that `read` returns; 0 but for a stream of an earlier process."""
        return self._frames.start

    def keep(self, offset: int) -> int:
        """Let go of the log before an offset, while it is read; return the bytes that the rest takes."""
        return 0 if self._frames.log is None else self._frames.log.keep(offset)

    def ended(self) -> None:
        """Take note in the log that nothing more is received."""
        if self._frames.log is not None:
            self._frames.log.close()

    def forgo(self) -> None:
        """Do without a log from now on: this stream is not to be held."""
        self._frames.log = None
        if self.own is not None:
            self.own.close()
            self.own = None

    async def read(self) -> bytes:
        """Return the next bytes, b"" at the stream's end. Raises `Lost` if it broke off."""
        while not self._arrived:
            if self._frames.ended:
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
        while self._paused and not self._gone and not self._frames.ended and taken < _TAKEN:
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
        await self._send(BINARY, data)

    @property
    def unsent(self) -> int:
        """How many written bytes incusd has not taken."""
        if self._gone:
            return 0
        kept = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return int(struct.unpack("i", kept)[0]) + self._transport.get_write_buffer_size()

    async def write_end(self) -> None:
        """Say that no more bytes come."""
        await self._send(TEXT, b"")

    def close(self) -> None:
        """Hang up, by a closing frame unless it would wait behind what incusd does not take. Idempotent."""
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

    def hang_up(self) -> None:
        """Close, but for the descriptor of our own, which stays what it is until `close`."""
        if self.own is None:
            self.close()
            return
        # what others hold must be hung up too, and at once: the transport writes only later
        with contextlib.suppress(OSError):
            if not self._gone and not self.unsent:
                self.own.send(b"".join(frame(CLOSE, b"")))
            self.own.shutdown(socket.SHUT_RDWR)
        self._gone = True

    async def _send(self, kind: int, data: bytes) -> None:
        await self._writable.wait()
        # On a lost connection the `writelines` of CPython 3.13.5 has the loop watch the descriptor forever,
        # whosever it is next.
        if not self._gone and not self._transport.is_closing():
            self._transport.writelines(frame(kind, data))
            await self._writable.wait()

    # --- what the event loop calls ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's derive from nothing

    def get_buffer(self, sizehint: int) -> memoryview:
        log = self._frames.log
        if log is not None:
            try:
                return log.room()
            except Full:
                self._frames.log = None
        return _SHARED

    def buffer_updated(self, nbytes: int) -> None:
        log = self._frames.log
        view = _SHARED[:nbytes] if log is None else log.landed(nbytes)
        if not self._upgraded.done():
            view = self._upgrade(view)
        self._take_in(view)
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
            self._upgraded.set_exception(ConnectionRefusedError(f"incusd answered the handshake by {status}"))
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
