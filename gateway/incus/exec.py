"""Knows the websockets of one Incus exec.

Facts about incusd that shape this module (measured on 6.0.4):

- A command starts once sockets 0, 1 and 2 are connected; control is optional, so it must be connected
  before them or a short command ends first. Losing control kills the command's leader, nothing else does.
- The end of a stream is an empty text frame; then the socket is closed without a close frame.
- incusd pings exec sockets and never looks at the answer. A pong written to a socket that the other end
  has closed makes asyncio drop what the kernel still holds unread, so none is ever sent.
- With a terminal the operation goes on until the client closes socket 0.
- Return codes 126 and 127 are reported as a failed operation, also when they are the program's own.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import aiohttp
import orjson

if TYPE_CHECKING:
    from gateway.incus.client import Operation


class Lost(Exception):
    """The daemon or its sockets went away before a wait status was seen."""


_WS_TIMEOUT = aiohttp.ClientWSTimeout(ws_close=1.0)  # incusd mostly hangs up without a close frame


async def connect(
    session: aiohttp.ClientSession, base: str, fds: dict[str, str]
) -> dict[str, aiohttp.ClientWebSocketResponse]:
    """Open every socket of an exec operation, control first; closes what it opened where one fails."""
    opened: dict[str, aiohttp.ClientWebSocketResponse] = {}

    async def one(name: str) -> None:
        url = f"{base}?secret={fds[name]}"
        opened[name] = await session.ws_connect(
            url, max_msg_size=0, compress=0, autoping=False, timeout=_WS_TIMEOUT
        )

    tasks: list[asyncio.Task[None]] = []
    try:
        await one("control")
        tasks = [asyncio.create_task(one(name)) for name in fds if name != "control"]
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _close(opened)
        raise
    return opened


async def _close(sockets: dict[str, aiohttp.ClientWebSocketResponse]) -> None:
    # control last: without it incusd kills the leader before the others have said goodbye
    for name in sorted(sockets):
        with contextlib.suppress(aiohttp.ClientError, OSError):
            await sockets[name].close()


class ExecSockets:
    """The connected sockets of one command.

    Outputs are "1" and "2", or "0" alone with a terminal. What is not read stops the command in time:
    incusd holds back, nothing is lost.
    """

    def __init__(
        self,
        operation: str,
        sockets: dict[str, aiohttp.ClientWebSocketResponse],
        waiting: asyncio.Task[Operation],
        *,
        terminal: bool,
    ) -> None:
        self.operation = operation
        self.terminal = terminal
        self._sockets = sockets
        self._waiting = waiting

    async def read(self, fd: str) -> bytes:
        """Return the next bytes of an output, b"" at its end. Raises `Lost` where it broke off."""
        socket = self._sockets[fd]
        while True:
            message = await socket.receive()
            if message.type is aiohttp.WSMsgType.BINARY:
                if message.data:
                    return message.data  # type: ignore[no-any-return]  # bytes, by its type
            elif message.type is aiohttp.WSMsgType.TEXT:
                return b""
            elif message.type not in (aiohttp.WSMsgType.PING, aiohttp.WSMsgType.PONG):
                raise Lost(f"output {fd} broke off")

    async def write(self, data: bytes) -> None:
        """Give bytes to the command; waits while it does not read. Dropped where it has ended."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            await self._sockets["0"].send_bytes(data)

    async def close_stdin(self) -> None:
        """End the input; on a terminal that is Ctrl-D."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            if self.terminal:
                await self._sockets["0"].send_bytes(b"\x04")
            else:
                await self._sockets["0"].send_str("")

    async def control(self, command: dict[str, object]) -> None:
        """Send one control message; dropped where the command has ended."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            await self._sockets["control"].send_bytes(orjson.dumps(command))

    async def result(self) -> Operation:
        """Return the ended operation; call it after the outputs have ended.

        Raises `IncusError` where incusd went away.
        """
        if self.terminal:  # the operation goes on until we hang up
            await _close({"0": self._sockets["0"]})
        return await asyncio.shield(self._waiting)

    async def aclose(self) -> None:
        """Close all sockets, which kills a leader that still runs (its children live on). Idempotent."""
        self._waiting.cancel()
        await _close(self._sockets)
        await asyncio.gather(self._waiting, return_exceptions=True)
