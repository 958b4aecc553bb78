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
from pathlib import Path
from typing import Final

import orjson

from gateway.incus.operation import Operation
from gateway.incus.socket import StreamSocket

RELIEF: Final = 3.0  # seconds for which an output may be left alone; less than the deadline of a ping


async def connect(socket: Path, operation: str, fds: dict[str, str]) -> dict[str, StreamSocket]:
    """Open every socket of an exec operation, control first; closes what it opened where one fails.

    Raises `OSError`.
    """
    opened: dict[str, StreamSocket] = {}

    async def one(name: str) -> None:
        path = f"/1.0/operations/{operation}/websocket?secret={fds[name]}"
        opened[name] = await StreamSocket.connect(socket, path)

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
    incusd holds back, nothing is lost.
    """

    def __init__(
        self,
        operation: str,
        sockets: dict[str, StreamSocket],
        waiting: asyncio.Task[Operation],
        *,
        terminal: bool,
    ) -> None:
        self.operation = operation
        self.terminal = terminal
        self._sockets = sockets
        self._waiting = waiting

    async def read(self, fd: str) -> bytes:
        """Return the next bytes of an output, b"" at its end. Raises `Lost` if it broke off."""
        return await self._sockets[fd].read()

    def take(self, fd: str) -> bytes:
        """Return at once all that has come of an output and was not read; b"" if there is none."""
        return self._sockets[fd].take()

    async def write(self, data: bytes) -> None:
        """Give bytes to the command; waits while it does not read. Dropped where it has ended."""
        await self._sockets["0"].write(data)

    @property
    def unsent(self) -> int:
        """How many bytes of input incusd has not taken."""
        return self._sockets["0"].unsent

    async def close_stdin(self) -> None:
        """End the input; on a terminal that is Ctrl-D."""
        if self.terminal:
            await self._sockets["0"].write(b"\x04")
        else:
            await self._sockets["0"].write_end()

    async def control(self, command: dict[str, object]) -> None:
        """Send one control message; dropped where the command has ended."""
        await self._sockets["control"].write(orjson.dumps(command))

    async def result(self) -> Operation:
        """Return the ended operation; call it after the outputs have ended.

        Raises `IncusError` if incusd went away.
        """
        if self.terminal:  # the operation goes on until we hang up
            self._sockets["0"].close()
        return await asyncio.shield(self._waiting)

    async def aclose(self) -> None:
        """Close all sockets, which kills a leader that still runs (its children live on). Idempotent."""
        self._waiting.cancel()
        # control last: without it incusd kills the leader before the others have said goodbye
        for name in sorted(self._sockets):
            self._sockets[name].close()
        await asyncio.gather(self._waiting, return_exceptions=True)
