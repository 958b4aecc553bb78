"""One websocket of an Incus exec, as a byte stream in each direction.

A stream that is to survive this process is received into a log (`memory`) and has a second descriptor beside
the transport's, to be held.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from gateway.incus.frame_socket import FrameSocket
from gateway.incus.frames import BINARY, CLOSE, TEXT, Frames, arrived, frame
from gateway.incus.memory import ExecMemory, Log, Odometer


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
