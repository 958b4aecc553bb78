"""The client's end of a running command: receives output, sends input, reattaches after a break."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from gateway_client import wire
from gateway_client.connection import Connection
from gateway_client.connections import Connections
from gateway_client.errors import Disconnected, GatewayError, NotFound, RateLimited, Unavailable, from_wire
from gateway_client.input import Sent
from gateway_client.output import Buffer

# bytes of output between two acknowledgements; a gateway sends 1 MiB ahead at the least
ACK: Final = 256 << 10
# bytes of each stream that the gateway may send ahead of our acknowledgements: no more than it can send again
# after a break (fewer if its GATEWAY_EXEC_UNACKED is less), and enough that no sender waits for one
WINDOW: Final = 8 << 20
# seconds for an answer to `exec/start` or `exec/attach`
START_TIMEOUT: Final = 60.0

Reason = Literal["exited", "cancelled", "timeout", "lost"]
Encoding = Literal["binary", "utf-8"]


@dataclass(frozen=True, slots=True)
class Exit:
    """How a command ended. `code` is None if its status was lost: `reason` then says `lost`.

    `left` is how many processes of its tree run on, None if that is not known; `cancel` ends them.
    """

    code: int | None
    signal: str | None
    reason: Reason
    duration_ms: int
    left: int | None = None


class Acknowledgements:
    """Calls `send` whenever `ACK` more bytes have arrived.

    This runs in a separate task: while the command's input is full nothing can be sent, but output must still
    be read.
    """

    def __init__(self, send: Callable[[], Awaitable[None]]) -> None:
        self._send = send
        self._bytes = 0
        self._due = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def count(self, size: int) -> None:
        self._bytes += size
        if self._bytes >= ACK:
            self._bytes = 0
            self._due.set()
            if self.task is None:
                self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            await self._send()


class Attachment:
    """A command as one connection at a time carries it; it is that connection's `Receiver`.

    `exit` resolves once the command has ended and its last output is in the buffers, or fails with the error
    that ended the attachment. `arrived` is set when anything has arrived. `id`, `pid` and `started_at` are
    the command's.
    """

    def __init__(self, connections: Connections, exec_id: str, buffer: int, encoding: Encoding) -> None:
        self._connections = connections
        self._connection: Connection | None = None
        self._left = False
        self._channel: int | None = None
        self._attachment: str | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._sent = Sent()
        self._input_failure: GatewayError | None = None
        self._acks = Acknowledgements(self._acknowledge)
        self.reading: Mapping[str, Any] = {"acks": True, "window": WINDOW}
        if encoding != "binary":
            self.reading = {**self.reading, "encoding": encoding}
        self.stdout, self.stderr = Buffer(buffer), Buffer(buffer)
        self.arrived = asyncio.Event()
        self.exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.id = exec_id
        self.pid: int | None = None
        self.started_at: Any = None

    @property
    def active(self) -> bool:
        """Whether the command has been started or attached to, and not been left since."""
        return self._connection is not None and not self._left

    @property
    def resuming(self) -> bool:
        return self._resuming is not None

    def connection(self) -> Connection:
        """Return the connection that carries the command. Raises `Disconnected` before there was one."""
        if self._connection is None:
            raise Disconnected("use a command inside its `async with`")
        return self._connection

    def attached(self, connection: Connection) -> None:
        """Use `connection` from now on."""
        self._connection = connection
        if connection.failure is not None:  # it broke before we took it over
            self.broken(connection.failure)

    def leave(self, error: GatewayError) -> Connection:
        """Stop receiving, and end whatever is open with `error`. Return the connection to release."""
        connection, self._left = self.connection(), True
        connection.receiver = None
        self.end(error)
        return connection

    async def stop(self) -> None:
        """End the tasks that resume and acknowledge."""
        tasks = [task for task in (self._resuming, self._acks.task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def end(self, error: GatewayError | None) -> None:
        """End both streams, and the exit if it has not come, with `error`."""
        if error is not None and not self.exit.done():
            self.exit.set_exception(error)
            self.exit.exception()  # mark as retrieved: perhaps nothing waits for the exit
        for buffer in (self.stdout, self.stderr):
            if not buffer.ended:
                buffer.end(error)
        self.arrived.set()

    # --- input ----------------------------------------------------------------------------------------

    async def write(self, chunk: bytes) -> None:
        """Send input; waits while the gateway's buffer is full or the connection is being replaced."""
        async with self._writing:
            await self._resumed()
            self._sent.add(chunk)
            await self._give([chunk])

    async def close_input(self) -> None:
        async with self._writing:
            await self._resumed()
            self._sent.closed = True
            await self._give([])

    async def _give(self, chunks: list[bytes]) -> None:
        """Send input, and its end if it has one. After a break `_resume` sends it again."""
        connection = self.connection()
        try:
            await self._pass(connection, chunks)
        except Unavailable as error:
            if error is not connection.failure:
                raise
            await self._resumed()

    async def _pass(self, connection: Connection, chunks: list[bytes]) -> None:
        for chunk in chunks:
            assert self._channel is not None
            await connection.send(wire.StreamId.STDIN, self._channel, chunk)
        if self._sent.closed:
            # on the connection that carried the input: the end must not overtake it
            await connection.post("exec/closeStdin", {"exec": self.id})

    async def _resumed(self) -> None:
        """Wait until there is a connection. Raises what finally failed, or that input was lost."""
        if self._resuming is not None:
            await asyncio.wait([self._resuming])
        if self.exit.done() and (error := self.exit.exception()) is not None:
            raise error.with_traceback(None)
        if self._input_failure is not None:
            raise self._input_failure.with_traceback(None)

    # --- reconnecting ---------------------------------------------------------------------------------

    async def _resume(self, broken: Connection, error: GatewayError) -> None:
        """Attach again at the current offsets; end both streams with the error if that fails."""
        try:
            async with self._connections.patience() as patience:
                while True:
                    await self._connections.release(broken, good=False)
                    await self._connections.pause(patience, error)
                    broken = await self._connections.connect(patience, patient=True)
                    before = self.stdout.offset + self.stderr.offset
                    try:
                        await self._replace(broken)
                    except Unavailable as again:
                        error = again
                    else:
                        if broken.failure is None:
                            self._connection = broken
                            return
                        error = broken.failure
                    if self.stdout.offset + self.stderr.offset > before:
                        patience.restore()
        except GatewayError as final:
            broken.receiver = None
            await self._connections.release(broken, good=False)
            self.end(final)
        except TimeoutError:
            self.end(Disconnected("the gateway refuses to attach to the command again"))
        finally:
            self._resuming = None

    async def _replace(self, connection: Connection) -> None:
        """Attach through another connection, and send the input that did not arrive."""
        connection.receiver = self
        params = {
            "exec": self.id,
            "from": {"stdout": self.stdout.offset, "stderr": self.stderr.offset},
            **self.reading,
        }
        missing: list[bytes] | None = [] if self._sent.end == 0 else None
        resume = {} if self._attachment is None else {"resume": self._attachment}
        async with asyncio.timeout(START_TIMEOUT):
            try:
                answer = await connection.request("exec/attach", {**params, **resume}, self.started)
            except NotFound:
                if not resume:
                    raise
                # with many readers the gateway forgets the first
                await connection.request("exec/attach", params, self.started)
            else:
                if resume:
                    missing = self._sent.since(int(answer.get("stdin", 0)))
        if missing is None:
            lost = Disconnected("the connection broke, and how much of the input arrived is not known")
            self._input_failure = lost
            return
        await self._pass(connection, missing)

    # --- what the connection brings -------------------------------------------------------------------

    def started(self, result: Any) -> None:
        """Take the answer to `exec/start` or `exec/attach`; passed on with these requests."""
        self._channel = int(result["channel"])
        self._attachment = result.get("attachment")
        self.id = str(result.get("exec", self.id))
        self.pid = result.get("pid", self.pid)
        self.started_at = result.get("startedAt", self.started_at)
        for name, buffer in (("stdout", self.stdout), ("stderr", self.stderr)):
            buffer.offset = int((result.get("from") or {}).get(name, buffer.offset))
            buffer.lost += int((result.get("lost") or {}).get(name, 0))

    def frame(self, frame: wire.Frame) -> None:
        if frame.channel != self._channel:
            return  # the rest of a command that had this connection before
        if frame.stream is wire.StreamId.STDERR:
            self.stderr.feed(frame.data)
        elif frame.stream is wire.StreamId.STDOUT:
            self.stdout.feed(frame.data)
        self.arrived.set()
        self._acks.count(len(frame.data))

    def notified(self, notification: wire.Notification) -> None:
        params = notification.params
        if params.get("exec") != self.id:
            return
        if notification.method == "exec/lost":
            buffer = self.stderr if params.get("stream") == "stderr" else self.stdout
            buffer.lost += int(params["bytes"])
            buffer.offset += int(params["bytes"])
        elif notification.method == "exec/detached" and params.get("channel") == self._channel:
            self.end(from_wire(str(params.get("reason")), "the token does not allow this command any more"))
        elif notification.method == "exec/exited" and not self.exit.done():
            for name, buffer in (("stdout", self.stdout), ("stderr", self.stderr)):
                missing = int((params.get("offsets") or {}).get(name, buffer.offset)) - buffer.offset
                buffer.lost += max(missing, 0)
            self.exit.set_result(
                Exit(
                    params.get("exitCode"),
                    params.get("signal"),
                    params.get("reason", "lost"),
                    int(params.get("durationMs") or 0),
                    params.get("left"),
                )
            )
            self.end(None)

    def broken(self, error: GatewayError) -> None:
        if not self.active or self._resuming is not None:
            return  # starting, resuming and leaving notice it themselves
        # a reader that stalled for too long was detached, and may attach again too
        passing = isinstance(error, Unavailable | RateLimited)
        if passing and not self.exit.done() and self._connections.http.retry is not None:
            self._resuming = asyncio.create_task(self._resume(self.connection(), error))
        else:
            self.end(error)

    async def room(self) -> None:
        await self.stdout.room()
        await self.stderr.room()

    async def _acknowledge(self) -> None:
        """Acknowledge what has arrived; the gateway keeps the rest in case of a break."""
        offsets = {"stdout": self.stdout.offset, "stderr": self.stderr.offset}
        if self._connection is not None:
            with contextlib.suppress(GatewayError):
                await self._connection.notify("exec/ack", {"exec": self.id, **offsets})
