"""Opens the websockets of one Incus exec.

Facts about incusd that shape this module (measured on 6.0.4):

- A command starts once sockets 0, 1 and 2 are connected; control is optional, so it must be connected
  before them or a short command ends first. Losing control kills the command's leader, nothing else does.
- The end of a stream is an empty text frame; then the socket is closed without a close frame.
- incusd pings exec sockets and never looks at the answer. A pong written to a socket that the other end
  has closed makes asyncio drop what the kernel still holds unread, so none is ever sent.
- Those pings, one in 10 s, are writes with a deadline of 5 s. Where a socket's buffer is full and the command
  silent, one fails, and what the command prints later is lost; where incusd itself waits to write output,
  none does harm. So what is held back for long is taken out (`take`) every `RELIEF` seconds.
- With a terminal the operation goes on until the client closes socket 0.
- Return codes 126 and 127 are reported as a failed operation, also when they are the program's own.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import orjson

from gateway.incus.frames import Frames
from gateway.incus.inlet import Inlet
from gateway.incus.memory import Log, Memory, Odometer
from gateway.incus.operation import Operation
from gateway.incus.socket import StreamSocket
from gateway.incus.waiting import Waiting

RELIEF: Final = 3.0  # seconds for which an output may be left alone; less than the deadline of a ping


def _area(name: str, *, terminal: bool) -> str | None:
    """Return where in a command's memory a socket is received, None if it brings no output."""
    outputs = {"0": "first"} if terminal else {"1": "first", "2": "second"}
    return outputs.get(name)


def outputs(memory: Memory, *, terminal: bool) -> dict[str, tuple[int, bytes]]:
    """Return the outputs that the memory of an ended command has, each by its first byte's offset.

    Raises `ValueError`.
    """
    found: dict[str, tuple[int, bytes]] = {}
    for name in ("0",) if terminal else ("1", "2"):
        log = Log(memory, _area(name, terminal=terminal) or "", None)
        frames = Frames(log)
        found[name] = frames.start, b"".join(b"".join(frames.feed(view)) for view in log.replay())
    return found


async def connect(
    place: Path, operation: str, fds: Mapping[str, str], memory: Memory | None, *, terminal: bool
) -> dict[str, StreamSocket]:
    """Open every socket of an exec operation, control first; closes what it opened where one fails.

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

    Outputs are "1" and "2", or "0" alone with a terminal. What is not read stops the command in time:
    incusd holds back, nothing is lost. With a `memory` it can be held and adopted: see `descriptors`.
    """

    def __init__(
        self,
        sockets: dict[str, StreamSocket],
        waiting: Waiting,
        memory: Memory | None = None,
        pipe: tuple[int, int] | None = None,
        *,
        terminal: bool,
    ) -> None:
        self.terminal = terminal
        self.memory = memory
        self._sockets = sockets
        self._waiting = waiting
        self._result: asyncio.Task[Operation] | None = None
        self._inlet: Inlet | None = None
        if memory is not None and (own := sockets["0"].own) is not None:
            self._inlet = Inlet.made(own, memory) if pipe is None else Inlet(own, pipe, memory)

    @classmethod
    async def adopted(cls, descriptors: list[int]) -> ExecSockets:
        """Go on with the sockets of an earlier process; takes `descriptors` over.

        Raises `OSError`, and `ValueError` for what no process of ours left.
        """
        memory, out, into, *others = descriptors
        loose = [memory, out, into, *others]  # that nothing of ours closes yet
        opened: dict[str, StreamSocket] = {}
        owned: list[socket.socket] = []
        kept: Memory | None = None
        try:
            loose.remove(memory)
            kept = Memory(memory)
            for descriptor in others:
                owned.append(socket.socket(fileno=descriptor))
                loose.remove(descriptor)
            terminal = len(others) == 3
            names = ("control", "0") if terminal else ("control", "0", "1", "2")
            connections = dict(zip(names, owned[1:], strict=True))
            # all of them first: one that receives takes segments, which must not be another's
            logs = {
                name: Log(kept, area, Odometer(own))
                for name, own in connections.items()
                if (area := _area(name, terminal=terminal)) is not None
            }
            for name, own in connections.items():
                opened[name] = await StreamSocket.adopted(own, logs.get(name))
            return cls(opened, Waiting(owned[0]), kept, (out, into), terminal=terminal)
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

    @property
    def descriptors(self) -> list[int]:
        """What is to be held for `adopted`. Call it only with a `memory`."""
        assert self.memory is not None and self._inlet is not None
        # in the order in which `adopted` has them
        owned = [self._sockets[name].own for name in ("control", "0", "1", "2") if name in self._sockets]
        return [
            self.memory.descriptor,
            *self._inlet.pipe,
            self._waiting.own.fileno(),
            *(own.fileno() for own in owned if own is not None),
        ]

    def ended(self) -> None:
        """Take note that nothing more comes, so that the memory says all by itself."""
        for stream in self._sockets.values():
            stream.ended()

    def forgo(self) -> None:
        """Do without a memory from now on: this command is not to be held."""
        if self.memory is not None and self._inlet is not None:
            self._inlet.close()
            self._inlet = None
            for stream in self._sockets.values():
                stream.forgo()
            self.memory.close()
            self.memory = None

    def start(self, fd: str) -> int:
        """Return the offset of the first byte that `read` returns of an output."""
        return self._sockets[fd].start

    def keep(self, fd: str, offset: int) -> int:
        """Let go of an output in the memory before an offset; return the bytes that the rest takes."""
        return self._sockets[fd].keep(offset)

    @property
    def position(self) -> int:
        """How many bytes of input were given, by an earlier process too; 0 without a memory."""
        return 0 if self._inlet is None else self._inlet.position

    async def read(self, fd: str) -> bytes:
        """Return the next bytes of an output, b"" at its end. Raises `Lost` if it broke off."""
        return await self._sockets[fd].read()

    def take(self, fd: str) -> bytes:
        """Return at once all that has come of an output and was not read; b"" if there is none."""
        return self._sockets[fd].take()

    async def flush(self) -> None:
        """Send input that an earlier process had taken, but not sent."""
        if self._inlet is not None:
            await self._inlet.flush()

    async def write(self, data: bytes) -> None:
        """Give bytes to the command; waits while it does not read. Dropped where it has ended."""
        await (self._inlet or self._sockets["0"]).write(data)

    @property
    def unsent(self) -> int:
        """How many bytes of input incusd has not taken."""
        return (self._inlet or self._sockets["0"]).unsent

    async def close_stdin(self) -> None:
        """End the input; on a terminal that is Ctrl-D."""
        if self.terminal:
            await self.write(b"\x04")
        else:
            await (self._inlet or self._sockets["0"]).write_end()

    async def control(self, command: dict[str, object]) -> None:
        """Send one control message; dropped where the command has ended."""
        await self._sockets["control"].write(orjson.dumps(command))

    async def result(self) -> Operation:
        """Return the ended operation; call it after the outputs have ended.

        Raises `IncusError` if incusd went away.
        """
        if self.terminal:  # the operation goes on until we hang up
            self._sockets["0"].hang_up()
        if self._result is None:
            self._result = asyncio.create_task(self._waiting.result(), name="wait for an operation")
            # retrieved, or asyncio would log it
            self._result.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._result)

    async def aclose(self) -> None:
        """Close all sockets, which kills a leader that still runs (its children live on). Idempotent.

        A memory stays: what it has of the outputs may be wanted after the end.
        """
        if self._result is not None:
            self._result.cancel()
            await asyncio.gather(self._result, return_exceptions=True)
        self._waiting.close()
        if self._inlet is not None:
            self._inlet.close()
        # control last: without it incusd kills the leader before the others have said goodbye
        for name in sorted(self._sockets):
            self._sockets[name].close()
