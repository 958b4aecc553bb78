"""Input of a command that survives this process: each byte reaches incusd exactly once, even after a kill.

The kernel does not count the bytes sent on a socket. But a write into an empty pipe is all or nothing, and
`splice` moves bytes from the pipe to the socket in one call, so bytes still in the pipe are not in the
socket. The holder keeps pipe and socket, and the command's memory records the position of the input.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Sequence
from typing import Final

from gateway.incus.frames import BINARY, TEXT, frame
from gateway.incus.memory import ExecMemory

_PIECE: Final = 32 << 10  # bytes of input in one frame; with its header it fits into a pipe
_NONBLOCK: Final = 2  # SPLICE_F_NONBLOCK
# position, and 1 + the position after a write into the pipe that is under way, else 0
_PLACE: Final = struct.Struct("<QQ")


class Inlet:
    """The input of one command, of which `position` bytes are in the socket or the pipe."""

    def __init__(self, own: socket.socket, pipe: tuple[int, int], memory: ExecMemory) -> None:
        """Continue from the position in `memory`; an earlier process may have left a frame in the pipe."""
        self.pipe = pipe
        self._socket = own
        self._record = memory.record("place")
        self._turn = asyncio.Lock()
        self._closed = False
        self.position, after = _PLACE.unpack_from(self._record.read())
        self._waiting = in_pipe(pipe[0])  # bytes
        if after and self._waiting:
            self.position = after - 1
        self._commit()

    @classmethod
    def made(cls, own: socket.socket, memory: ExecMemory) -> Inlet:
        return cls(own, os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK), memory)

    @property
    def unsent(self) -> int:
        """Bytes written that incusd has not read yet."""
        if self._closed:
            return 0
        kept = fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4))
        return self._waiting + int(struct.unpack("i", kept)[0])

    async def write(self, data: bytes, *, end: bool = False) -> None:
        """Send bytes, waiting while incusd does not read them; `end` signals the end of the input too.

        Dropped if incusd has hung up.
        """
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            last = end and start + _PIECE >= len(data)
            await self._give(len(piece), [*frame(BINARY, piece), *(frame(TEXT, b"") if last else ())])

    async def write_end(self) -> None:
        """Signal the end of the input."""
        await self._give(0, frame(TEXT, b""))

    async def flush(self) -> None:
        """Send the bytes an earlier process left in the pipe."""
        async with self._turn:
            await self._move()

    def close(self) -> None:
        """Close the pipe. Idempotent."""
        if not self._closed:
            self._closed = True
            for descriptor in self.pipe:
                os.close(descriptor)

    async def _give(self, size: int, frames: Sequence[bytes]) -> None:
        """Send frames with `size` bytes of input."""
        async with self._turn:
            await self._move()
            if self._closed:
                return
            self._commit(self.position + size)
            self._waiting = os.write(self.pipe[1], b"".join(frames))
            self.position += size
            self._commit()
            await self._move()

    async def _move(self) -> None:
        """Move everything in the pipe to the socket."""
        loop = asyncio.get_running_loop()
        while not self._closed and self._waiting:
            try:
                moved = os.splice(self.pipe[0], self._socket.fileno(), self._waiting, flags=_NONBLOCK)
                self._waiting -= moved
            except BlockingIOError:
                free = asyncio.Event()
                loop.add_writer(self._socket, free.set)
                try:
                    await free.wait()
                finally:
                    with contextlib.suppress(ValueError):  # closed meanwhile
                        loop.remove_writer(self._socket)
            except OSError:  # incusd hung up
                os.read(self.pipe[0], self._waiting)
                self._waiting = 0

    def _commit(self, after: int | None = None) -> None:
        self._record.write(_PLACE.pack(self.position, 0 if after is None else after + 1))


def in_pipe(descriptor: int) -> int:
    """Return the number of bytes in a pipe, by either end."""
    return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0])
