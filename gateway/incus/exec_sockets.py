"""The websockets of one Incus exec.

Facts about incusd that shape this module (measured on 6.0.4):

- A command starts once sockets 0, 1 and 2 are connected. Control is optional, so it must be connected first,
 or a short command ends before it is. Only losing the control socket kills the command's leader.
- An empty text frame ends a stream; then the socket is closed without a close frame.
- incusd pings exec sockets but never checks the answers. Writing a pong to a socket closed by the peer makes
 asyncio drop what is still unread in the kernel, so no pong is ever sent.
- Those pings, one every 10 s, are writes with a deadline of 5 s. If a socket's buffer is full and the command
 is silent, a ping fails, and what the command prints later is lost; a ping does no harm while incusd is
 blocked writing output. So output held back for long is drained (`take`) every `RELIEF` seconds.
- If a command prints and ends just when incusd, which looks for output every second, was about to do so, its
 last output stays in the pipe (see `gateway.rootfs.process_tree`). It is read from there (`open_pipes`).
- With a terminal, the operation lasts until the client closes socket 0.
- Return codes 126 and 127 are reported as a failed operation, even if they are the program's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import orjson

from gateway.errors import GatewayError
from gateway.incus.frames import Frames
from gateway.incus.inlet import Inlet, in_pipe
from gateway.incus.memory import ExecMemory, Log, Odometer
from gateway.incus.operation import Operation
from gateway.incus.socket import StreamSocket
from gateway.incus.waiting import OperationWait

_OPENING: Final = 0.25  # seconds until the pipes are opened: well before incusd first looks again
_TRIES: Final = 8  # of these times, as on a busy host or in a container that boots the shell may not run yet
RELIEF: Final = 3.0  # seconds an output may stay unread; less than the deadline of a ping


def _area(name: str, *, terminal: bool) -> str | None:
    """Return the area of a command's memory for a socket's output, None if it carries none."""
    outputs = {"0": "first"} if terminal else {"1": "first", "2": "second"}
    return outputs.get(name)


def outputs(memory: ExecMemory, *, terminal: bool) -> dict[str, tuple[int, bytes]]:
    """Return the outputs in an ended command's memory, each with the offset of its first byte.

    Raises `ValueError`.
    """
    found: dict[str, tuple[int, bytes]] = {}
    for name in ("0",) if terminal else ("1", "2"):
        log = Log(memory, _area(name, terminal=terminal) or "", None)
        frames = Frames(log)
        found[name] = frames.start, b"".join(b"".join(frames.feed(view)) for view in log.replay())
    return found


async def connect(
    place: Path, operation: str, fds: Mapping[str, str], memory: ExecMemory | None, *, terminal: bool
) -> dict[str, StreamSocket]:
    """Open every socket of an exec operation, control first. If one fails, the others are closed.

    Raises `OSError`.
    """
    opened: dict[str, StreamSocket] = {}

    async def one(name: str) -> None:
        path = f"/1.0/operations/{operation}/websocket?secret={fds[name]}"
        opened[name] = await StreamSocket.connect(place, path, memory, _area(name, terminal=terminal))

    tasks: list[asyncio.Task[None]] = []
    try:
        await one("control")
        tasks = [asyncio.create_task(one(name)) for name in fds if name != "control"]
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in opened.values():
            stream.close()
        raise
    return opened


class ExecSockets:
    """The connected sockets of one command.

    Outputs are "1" and "2", or only "0" with a terminal. If an output is not read, incusd eventually blocks
    the command; nothing is lost. With a `memory` the sockets can be held and adopted: see `descriptors`.
    """

    def __init__(
        self,
        sockets: dict[str, StreamSocket],
        waiting: OperationWait,
        memory: ExecMemory | None = None,
        pipe: tuple[int, int] | None = None,
        *,
        terminal: bool,
    ) -> None:
        self.terminal = terminal
        self.memory = memory
        self._sockets = sockets
        self._waiting = waiting
        self._result: asyncio.Task[Operation] | None = None
        self._sending: asyncio.Task[None] | None = None  # sends the input an earlier process accepted last
        self._timer: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None
        self._pipes: dict[str, int] = {}  # reading ends of the outputs
        self._inlet: Inlet | None = None
        if memory is not None and (own := sockets["0"].own) is not None:
            self._inlet = Inlet.made(own, memory) if pipe is None else Inlet(own, pipe, memory)

    @classmethod
    async def adopted(cls, descriptors: list[int]) -> ExecSockets:
        """Continue with the sockets of an earlier process. Takes ownership of `descriptors`.

        Raises `OSError`, and `ValueError` if they are not a command's sockets.
        """
        memory, out, into, *others = descriptors
        loose = [memory, out, into, *others]  # not owned by any object yet
        opened: dict[str, StreamSocket] = {}
        owned: list[socket.socket] = []
        kept: ExecMemory | None = None
        try:
            loose.remove(memory)
            kept = ExecMemory(memory)
            for descriptor in others:
                owned.append(socket.socket(fileno=descriptor))
                loose.remove(descriptor)
            terminal = len(others) == 3
            names = ("control", "0") if terminal else ("control", "0", "1", "2")
            connections = dict(zip(names, owned[1:], strict=True))
            # open all logs first: a socket that receives takes segments, which must not belong to another log
            logs = {
                name: Log(kept, area, Odometer(own))
                for name, own in connections.items()
                if (area := _area(name, terminal=terminal)) is not None
            }
            for name, own in connections.items():
                opened[name] = await StreamSocket.adopted(own, logs.get(name))
            found = cls(opened, OperationWait(owned[0]), kept, (out, into), terminal=terminal)
        except BaseException:
            for stream in opened.values():
                stream.close()
            for own in owned:
                own.close()
            for descriptor in loose:
                os.close(descriptor)
            if kept is not None:
                kept.close()
            raise
        if found._inlet is not None:
            found._sending = asyncio.create_task(found._inlet.flush(), name="input of an adopted command")
        return found

    @property
    def descriptors(self) -> list[int]:
        """The descriptors to hold for `adopted`. Requires a `memory`."""
        assert self.memory is not None and self._inlet is not None
        # in the order that `adopted` expects
        owned = [self._sockets[name].own for name in ("control", "0", "1", "2") if name in self._sockets]
        return [
            self.memory.descriptor,
            *self._inlet.pipe,
            self._waiting.own.fileno(),
            *(own.fileno() for own in owned if own is not None),
        ]

    def ended(self) -> None:
        """Mark the logs as complete, so that the memory can be read without the sockets."""
        for stream in self._sockets.values():
            stream.ended()

    def leave(self) -> None:
        """Stop using the sockets, which another process continues with; they stay open."""
        for stream in self._sockets.values():
            stream.leave()
        for task in (self._result, self._sending):
            if task is not None:
                task.cancel()
        self._close_pipes()

    def forgo(self) -> None:
        """Give up the memory: this command will not be held."""
        if self.memory is not None:
            if self._inlet is not None:
                self._inlet.close()
                self._inlet = None
            for stream in self._sockets.values():
                stream.forgo()
            self.memory.close()
            self.memory = None

    def open_pipes(self, pipes: Callable[[], Awaitable[list[int]]]) -> None:
        """Open the command's own output pipes soon, to read at the end what incusd leaves in them.

        `pipes` returns their reading ends, "1" first, or [] if the command does not run yet. A command that
        ends within a moment needs none; a terminal has none.
        """
        if not self.terminal:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_OPENING, self._begin_opening, pipes)

    def _begin_opening(self, pipes: Callable[[], Awaitable[list[int]]]) -> None:
        self._opening = asyncio.create_task(self._open(pipes), name="open the outputs of a command")

    async def _open(self, pipes: Callable[[], Awaitable[list[int]]]) -> None:
        with contextlib.suppress(GatewayError):  # the broker is away, or of an earlier version
            for _ in range(_TRIES):
                if found := await pipes():
                    self._pipes = dict(zip(("1", "2"), found, strict=True))
                    return
                await asyncio.sleep(_OPENING)

    def _close_pipes(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._opening is not None:
            self._opening.cancel()
        for descriptor in self._pipes.values():
            os.close(descriptor)
        self._pipes = {}

    def start(self, fd: str) -> int:
        """Return the offset of the first byte `read` returns of an output."""
        return self._sockets[fd].start

    def keep(self, fd: str, offset: int) -> int:
        """Drop an output's logged bytes before an offset; return the size of the rest in bytes."""
        return self._sockets[fd].keep(offset)

    @property
    def position(self) -> int:
        """Bytes of input written so far, including by earlier processes; 0 without a memory."""
        return 0 if self._inlet is None else self._inlet.position

    async def read(self, fd: str) -> bytes:
        """Return the next bytes of an output, b"" at its end. Raises `Lost` if it breaks."""
        stream = self._sockets[fd]
        if data := await stream.read():
            return data
        pipe = self._pipes.pop(fd, None)
        if pipe is None or not (left := _left_in(pipe)):
            return b""
        stream.add(left)
        return await stream.read()

    def take(self, fd: str) -> bytes:
        """Return all unread bytes of an output that have arrived, b"" if none. Does not wait."""
        return self._sockets[fd].take()

    async def write(self, data: bytes, *, end: bool = False) -> None:
        """Write to the command's stdin, waiting while it does not read; `end` closes it after that.

        Dropped if the command has ended.
        """
        if into := self._inlet or self._sockets.get("0"):
            await into.write(data, end=end)

    @property
    def unsent(self) -> int:
        """Bytes of input that incusd has not read yet."""
        into = self._inlet or self._sockets.get("0")
        return 0 if into is None else into.unsent

    async def close_stdin(self) -> None:
        """Close stdin; on a terminal, send Ctrl-D."""
        if self.terminal:
            await self.write(b"\x04")
        elif into := self._inlet or self._sockets.get("0"):
            await into.write_end()

    async def resize(self, cols: int, rows: int) -> None:
        """Change the terminal's size. Dropped if the command has ended."""
        # incusd expects strings
        size = {"width": str(cols), "height": str(rows)}
        await self._control({"command": "window-resize", "args": size})

    async def signal(self, number: int) -> None:
        """Send a signal to the command's leader. Dropped if the command has ended."""
        await self._control({"command": "signal", "signal": number})

    async def _control(self, command: dict[str, object]) -> None:
        if (control := self._sockets.get("control")) is not None:
            await control.write(orjson.dumps(command))

    async def result(self) -> Operation:
        """Wait for the operation's result. Call it after the outputs have ended.

        Raises `IncusError` if incusd went away.
        """
        if self.terminal:  # the operation lasts until we hang up
            self._sockets["0"].hang_up()
        if self._result is None:
            self._result = asyncio.create_task(self._waiting.result(), name="wait for an operation")
            # mark as retrieved, or asyncio logs it
            self._result.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._result)

    async def aclose(self) -> None:
        """Close all sockets, which kills a leader that still runs, but not its children. Idempotent.

        The memory stays open: its outputs may be needed after the end.
        """
        tasks = [task for task in (self._result, self._sending) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close_pipes()
        self._waiting.close()
        if self._inlet is not None:
            self._inlet.close()
        # control last: once it is gone incusd kills the leader, before the other sockets are closed properly
        for name in sorted(self._sockets):
            self._sockets[name].close()
        # what is known of an ended command is kept for a while: not with all of this
        self._sockets, self._result, self._inlet = {}, None, None


def _left_in(pipe: int) -> bytes:
    """Return what incusd has left in a pipe, and close it."""
    try:
        size = in_pipe(pipe)
        return os.read(pipe, size) if size else b""
    except BlockingIOError:  # a tenant put a pipe of its own in its place, and reads it
        return b""
    finally:
        os.close(pipe)
