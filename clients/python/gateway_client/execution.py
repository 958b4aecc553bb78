"""One command from the client's side: start, output, input, waiting for its end, cancelling."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal

from gateway_client.attachment import START_TIMEOUT, Attachment, Encoding, Exit
from gateway_client.connection import Connection
from gateway_client.connections import Connections
from gateway_client.errors import Disconnected, GatewayError, NotFound, Unavailable
from gateway_client.input import CHUNK
from gateway_client.output import Buffer, Output

END_TIMEOUT: Final = 30.0


@dataclass(frozen=True, slots=True)
class Killed:
    """What a cancel did; `survivors` is 0 unless the gateway could not end the tree."""

    killed: int
    escalated: bool
    survivors: int


class Exec:
    """A command in a tenant. Made by `Tenant.exec` or `Tenant.attach`; runs inside its `async with`.

    Leaving the block ends the command and its whole tree, unless it has ended or was `detach`ed. The two
    streams share a connection: a reader that leaves one of them with a full buffer stops the other too, as
    pipes do. Read both, or use `output()`, or ask for a `pty`, or read neither and `wait()`.

    A connection that breaks is replaced as the client's `Retry` says. The output then continues at its
    offset, `lost` counts what the gateway could not keep, and input that had not arrived is sent again.
    """

    def __init__(
        self,
        connections: Connections,
        method: Literal["exec/start", "exec/attach"],
        params: Mapping[str, Any],
        buffer: int,
        encoding: Encoding,
    ) -> None:
        exec_id = str(params.get("execId") or params.get("exec"))
        self._connections, self._method = connections, method
        self._attachment = Attachment(connections, exec_id, buffer, encoding)
        self._params = {**params, **self._attachment.reading}
        self.stdout, self.stderr = Output(self._attachment.stdout), Output(self._attachment.stderr)

    @property
    def id(self) -> str:
        return self._attachment.id

    @property
    def pid(self) -> int | None:
        return self._attachment.pid

    @property
    def started_at(self) -> Any:
        return self._attachment.started_at

    async def __aenter__(self) -> Exec:
        async with self._connections.patience() as patience:
            again = False
            while True:
                connection = await self._connections.acquire(patience, fresh=again)
                try:
                    await self._begin(connection, again)
                except Unavailable as error:
                    connection.receiver = None
                    await self._connections.release(connection, good=error is not connection.failure)
                    if error is not connection.failure:
                        raise
                    # an idle connection may have died unnoticed: it is replaced whatever `Retry` says
                    if again:
                        await self._connections.pause(patience, error)
                    again = True
                except BaseException as error:
                    connection.receiver = None
                    if not isinstance(error, GatewayError) and self._method == "exec/start":
                        # given up while it starts or has started: the gateway refuses or ends it
                        with contextlib.suppress(GatewayError, TimeoutError):
                            async with asyncio.timeout(END_TIMEOUT):
                                await self.cancel()
                    await self._connections.release(connection, good=isinstance(error, GatewayError))
                    if isinstance(error, TimeoutError):
                        raise Disconnected("the gateway does not start the command") from None
                    raise
                else:
                    self._attachment.attached(connection)
                    return self

    async def _begin(self, connection: Connection, again: bool) -> None:
        attachment = self._attachment
        connection.receiver = attachment
        async with asyncio.timeout(START_TIMEOUT):
            if again and self._method == "exec/start":
                # the id is ours, and the first request may have arrived
                with contextlib.suppress(NotFound):
                    params = {"exec": self.id, **attachment.reading}
                    await connection.request("exec/attach", params, attachment.started)
                    return
            await connection.request(self._method, self._params, attachment.started)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        attachment = self._attachment
        if not attachment.active:
            return
        ended = False
        try:
            for buffer in (attachment.stdout, attachment.stderr):
                buffer.abandon()
            if attachment.resuming:
                await attachment.stop()
                attachment.end(Disconnected("the command was left"))
            broken = attachment.exit.done() and attachment.exit.exception() is not None
            if broken or not attachment.exit.done():
                # a broken connection did not end the command either
                with contextlib.suppress(GatewayError, TimeoutError):
                    async with asyncio.timeout(END_TIMEOUT):
                        await self.cancel()
                        await asyncio.shield(attachment.exit)
            ended = attachment.exit.done() and attachment.exit.exception() is None
        finally:
            connection = attachment.leave(Disconnected("the command was left"))
            await attachment.stop()
            await self._connections.release(connection, good=ended)

    async def write(self, data: bytes) -> None:
        """Send bytes to the command's input; waits while the gateway's buffer is full."""
        self._attachment.connection()
        for start in range(0, len(data), CHUNK):
            await self._attachment.write(data[start : start + CHUNK])

    async def close_stdin(self) -> None:
        """Close the command's input."""
        self._attachment.connection()
        await self._attachment.close_input()

    async def resize(self, cols: int, rows: int) -> None:
        """Change the terminal's size."""
        await self._connections.request("exec/resize", {"exec": self.id, "cols": cols, "rows": rows})

    async def signal(self, signal: str | int, *, tree: bool = False) -> None:
        """Send one signal, such as `INT`, to the command itself; with `tree`, to all its processes."""
        params = {"exec": self.id, "signal": signal, **({"tree": True} if tree else {})}
        await self._connections.request("exec/signal", params)

    async def cancel(self, grace: float | None = None) -> Killed:
        """End the whole tree: TERM, `grace` seconds, KILL. Returns when all of it has ended."""
        params: dict[str, Any] = {"exec": self.id}
        if grace is not None:
            params["graceMs"] = round(grace * 1000)
        # not on our own connection, where answers come behind output that may never be read
        answer = await self._connections.request("exec/cancel", params)
        return Killed(int(answer["killed"]), bool(answer["escalated"]), int(answer["survivors"]))

    async def wait(self, *, discard: bool = False) -> Exit:
        """Wait for the command's end and its last output, and return how it ended.

        An unread stream keeps its last buffer, and `lost` counts the rest. Read a stream to its end once you
        have begun to read it, or set `discard`. Raises `Disconnected` if the connection breaks and is not
        replaced.
        """
        for buffer in (self._attachment.stdout, self._attachment.stderr):
            buffer.wait(discard=discard)
        return await asyncio.shield(self._attachment.exit)

    async def detach(self) -> None:
        """Leave the command running for its linger time; attach to it again by its `id`."""
        attachment = self._attachment
        attachment.connection()
        await attachment.stop()
        connection = attachment.leave(Disconnected("detached from this command"))
        # closing is detaching, and needs no answer, which would come behind unread output
        await self._connections.release(connection, good=False)

    async def output(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes]]:
        """Yield the chunks of both streams with their names, as they arrive. Nothing else may read then."""
        attachment = self._attachment
        buffers: dict[Literal["stdout", "stderr"], Buffer] = {
            "stdout": attachment.stdout,
            "stderr": attachment.stderr,
        }
        for buffer in buffers.values():
            buffer.begin()
        while True:
            attachment.arrived.clear()
            for name, buffer in buffers.items():
                while buffer.filled and (chunk := await buffer.take()) is not None:
                    yield name, chunk
            if not any(buffer.filled for buffer in buffers.values()):
                if all(buffer.ended for buffer in buffers.values()):
                    for buffer in buffers.values():
                        if buffer.error is not None:
                            raise buffer.error.with_traceback(None)
                    return
                await attachment.arrived.wait()
