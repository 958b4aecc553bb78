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

The kernel does not count the bytes sent on a socket. But a write into an empty pipe is all or nothing, and
`splice` moves bytes from the pipe to the socket in one call, so bytes still in the pipe are not in the
socket. The holder keeps pipe and socket, and the command's memory records the position of the input.

incusd answers `/wait` with a header at once and a body when the operation ends. Since the request is made on
a separate connection before the command starts, the body stays in the connection's buffer for as long as
anybody holds the descriptor; the operation's own record is gone 5 s after its end. `Connection: close` makes
sure that the descriptor is good for this one answer and for no other request.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.errors import GatewayError
from gateway.incus.memory import ExecMemory, Log, Odometer
from gateway.incus.rest import IncusError, Operation
from gateway.incus.stream_socket import BINARY, TEXT, Frames, StreamSocket, frame

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


_MOST: Final = 256 << 10  # most bytes of an answer
_PARTS: Final = 0.005  # seconds between checks of an incomplete answer
# incusd reports these return codes as errors, even if they are the program's own
_CODES: Final = {"Command not executable": 126, "Command not found": 127}


class OperationWait:
    """A pending `/wait` request: `ask` sends one, the constructor adopts the socket of an earlier one."""

    def __init__(self, own: socket.socket) -> None:
        self.own = own
        own.setblocking(False)

    @classmethod
    async def ask(cls, place: Path, operation: str) -> OperationWait:
        """Send the request. Raises `OSError`."""
        own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            own.setblocking(False)
            try:
                own.connect(str(place))
            except BlockingIOError:  # incusd's accept queue is full
                own.setblocking(True)
                await asyncio.to_thread(own.connect, str(place))
            path = f"/1.0/operations/{operation}/wait?timeout=-1"
            own.send(f"GET {path} HTTP/1.1\r\nHost: incus\r\nConnection: close\r\n\r\n".encode())
            return cls(own)
        except BaseException:
            own.close()
            raise

    async def result(self) -> Operation:
        """Wait for the operation's result. Raises `IncusError`, with status 0 if incusd went away."""
        while True:
            try:
                found = self.own.recv(_MOST, socket.MSG_PEEK)
            except BlockingIOError:
                await self._readable()
                continue
            except OSError:
                found = b""
            if not found:
                raise IncusError("incusd hung up before the end of an operation", 0)
            head, end, _ = found.partition(b"\r\n\r\n")
            if end and found.startswith(b"HTTP/") and b"chunked" in head.lower():
                self.own.recv(len(head) + len(end))  # or each peek would find it again
                continue
            if (body := _body(found)) is not None:
                return _operation(body)
            if self._hung_up():  # no more data will come
                if self.own.recv(_MOST, socket.MSG_PEEK) == found:
                    raise IncusError("incusd hung up in the middle of an answer", 0)
            else:
                await asyncio.sleep(_PARTS)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self.own.close()

    async def _readable(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.own, ready.set)
        try:
            await ready.wait()
        finally:
            with contextlib.suppress(ValueError):  # closed meanwhile
                loop.remove_reader(self.own)

    def _hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self.own, 0)
        return bool(poll.poll(0))


def _body(said: bytes) -> bytes | None:
    """Return the body of an answer whose header may have been consumed; None while it is incomplete."""
    if not said.startswith(b"HTTP/"):
        return _chunks(said)
    head, end, body = said.partition(b"\r\n\r\n")
    lengths = [
        int(line.partition(b":")[2])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    ]
    return body if end and lengths and len(body) >= lengths[0] else None


def _chunks(said: bytes) -> bytes | None:
    whole = b""
    while True:
        size, end, rest = said.partition(b"\r\n")
        if not end:
            return None
        length = int(size.partition(b";")[0], 16)
        if length == 0:
            return whole
        if len(rest) < length + 2:
            return None
        whole, said = whole + rest[:length], rest[length + 2 :]


def _operation(body: bytes) -> Operation:
    answer: Any = orjson.loads(body)
    record = answer.get("metadata") or {}
    error = str(answer.get("error") or record.get("err") or "")
    metadata = dict(record.get("metadata") or {})
    if error in _CODES:
        metadata.setdefault("return", _CODES[error])
    if answer.get("error_code") == 404:
        raise IncusError(error, 404)
    return Operation(ok=not error, error=error, metadata=metadata)


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
