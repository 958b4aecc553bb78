"""One running command from the client's side: its output, its input, its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal

from gateway import protocol
from gateway_client.connection import Connection
from gateway_client.connections import Connections
from gateway_client.errors import Disconnected, GatewayError, NotFound, RateLimited, Unavailable, from_wire

KiB, MiB = 1 << 10, 1 << 20

# bytes of each stream that wait here for the consumer before the socket is left alone
BUFFER: Final = 1 * MiB
# bytes of one input frame: small enough for any gateway's frame limit, large enough to be quick
CHUNK: Final = 256 * KiB
# bytes of input that are kept to be sent again after a break: more than the buffers on the way can hold
SENT: Final = 16 * MiB
# bytes of output between two acknowledgements
ACK: Final = 256 * KiB
START_TIMEOUT: Final = 60.0
END_TIMEOUT: Final = 30.0

Reason = Literal["exited", "cancelled", "timeout", "lost"]
Encoding = Literal["binary", "utf-8"]


@dataclass(frozen=True, slots=True)
class Exit:
    """How a command ended. `code` is None where its status was lost: `reason` then says `lost`.

    `left` is how many processes of its tree ran on, None where that is not known; `cancel` ends them.
    """

    code: int | None
    signal: str | None
    reason: Reason
    duration_ms: int
    left: int | None = None


@dataclass(frozen=True, slots=True)
class Killed:
    """What a cancel did; `survivors` is 0 unless the gateway could not end the tree."""

    killed: int
    escalated: bool
    survivors: int


class Output:
    """One output stream of a command, as an async iterator of bytes.

    At most `limit` bytes wait here (and one frame); then the connection is not read until half of them
    are taken, and in time the command itself is held up. `offset` counts the bytes received since the
    command began, `lost` those that no one will see: dropped by the gateway with nobody attached, or
    here by `Exec.wait`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._error: GatewayError | None = None
        self._ended = False
        self._waited = self._begun = self._abandoned = False
        self._drained = asyncio.Event()
        self.offset = 0
        self.lost = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self._begun = True
        while not self._chunks:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        chunk = self._chunks.popleft()
        self._size -= len(chunk)
        if self._size <= self._limit // 2:
            self._drained.set()
        return chunk

    async def read(self) -> bytes:
        """Return all that is left of the stream. Unbounded: for output known to be small."""
        return b"".join([chunk async for chunk in self])

    # what follows is for the exec alone

    def _feed(self, data: bytes) -> None:
        self.offset += len(data)
        self._chunks.append(data)
        self._size += len(data)
        self._changed.set()
        self._drop()

    def _drop(self) -> None:
        # nobody reads, and somebody waits for the end: the last `limit` bytes are kept
        if self._abandoned or (self._waited and not self._begun):
            while self._size > self._limit:
                dropped = len(self._chunks.popleft())
                self._size -= dropped
                self.lost += dropped
            self._drained.set()

    def _end(self, error: GatewayError | None = None) -> None:
        self._error, self._ended = error, True
        self._changed.set()
        self._drained.set()

    async def _room(self) -> None:
        while self._size > self._limit and not self._ended:
            self._drained.clear()
            await self._drained.wait()


class _Sent:
    """The last input that was sent, by its offsets: what of it had not arrived when a connection broke."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self.end = 0

    def add(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        self.end += len(data)
        while self._size - len(self._chunks[0]) >= SENT:
            self._size -= len(self._chunks.popleft())

    def since(self, offset: int) -> list[bytes] | None:
        """Return what was sent from `offset` on, None where that is no longer kept."""
        skip = offset - (self.end - self._size)
        if skip < 0:
            return None
        found = []
        for chunk in self._chunks:
            if skip < len(chunk):
                found.append(chunk[max(skip, 0) :])
            skip -= len(chunk)
        return found


class Exec:
    """A command in a tenant. Made by `Tenant.exec` or `Tenant.attach`; runs inside its `async with`.

    Leaving the block ends the command and its whole tree unless it has ended or was `detach`ed. The
    streams hold each other up: whoever lets one stand with more than a buffer full stops the other too,
    as pipes do; read both, or `output()`, or ask for a `pty`, or leave both alone and `wait()`.

    A connection that breaks is replaced as the client's `Retry` says: the output goes on where it stood,
    `lost` counting what the gateway could not keep, and input that had not arrived is sent again.
    """

    def __init__(
        self,
        connections: Connections,
        method: Literal["exec/start", "exec/attach"],
        params: Mapping[str, Any],
        buffer: int,
        encoding: Encoding,
    ) -> None:
        self._reading = {"acks": True, "encoding": encoding} if encoding != "binary" else {"acks": True}
        self._connections, self._method, self._params = connections, method, {**params, **self._reading}
        self._connection: Connection | None = None
        self._channel: int | None = None
        self._attachment: str | None = None
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._arrived = asyncio.Event()
        self._detached = False
        self._resuming: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._sent = _Sent()
        self._input_closed = False
        self._input_failure: GatewayError | None = None
        self._unacked = 0
        self._due = asyncio.Event()
        self._acking: asyncio.Task[None] | None = None
        self.stdout, self.stderr = Output(buffer), Output(buffer)
        self.id: str = str(params.get("execId") or params.get("exec"))
        self.pid: int | None = None
        self.started_at: Any = None

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
                    # an idle connection may have died unseen: that one is replaced whatever `Retry` says
                    if again:
                        await self._connections.pause(patience, error)
                    again = True
                except BaseException as error:
                    connection.receiver = None
                    if not isinstance(error, GatewayError) and self._method == "exec/start":
                        # given up while it starts, or has started: the gateway refuses it, or ends it
                        with contextlib.suppress(GatewayError, TimeoutError):
                            async with asyncio.timeout(END_TIMEOUT):
                                await self.cancel()
                    await self._connections.release(connection, good=isinstance(error, GatewayError))
                    if isinstance(error, TimeoutError):
                        raise Disconnected("the gateway does not start the command") from None
                    raise
                else:
                    self._connection = connection
                    if connection.failure is not None:  # at once again, before it was ours
                        self.broken(connection.failure)
                    return self

    async def _begin(self, connection: Connection, again: bool) -> None:
        connection.receiver = self
        async with asyncio.timeout(START_TIMEOUT):
            if again and self._method == "exec/start":
                # the id is ours, and the first request may have come through
                with contextlib.suppress(NotFound):
                    await connection.request("exec/attach", {"exec": self.id, **self._reading}, self._started)
                    return
            await connection.request(self._method, self._params, self._started)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is None or self._detached:
            return
        ended = False
        try:
            for output in (self.stdout, self.stderr):
                output._abandoned = True
                output._drop()
            if self._resuming is not None:
                await self._stop()
                self._mark(Disconnected("the command was left"))
            broken = self._exit.done() and self._exit.exception() is not None
            if broken or not self._exit.done():
                # a broken connection did not end the command either
                with contextlib.suppress(GatewayError, TimeoutError):
                    async with asyncio.timeout(END_TIMEOUT):
                        await self.cancel()
                        await asyncio.shield(self._exit)
            ended = self._exit.done() and self._exit.exception() is None
        finally:
            connection, self._detached = self._connection, True
            connection.receiver = None
            self._mark(Disconnected("the command was left"))
            await self._stop()
            await self._connections.release(connection, good=ended)

    # --- talking to it --------------------------------------------------------------------------------

    async def write(self, data: bytes) -> None:
        """Give bytes to the command's input; waits while the gateway's buffer is full."""
        self._running()
        for start in range(0, len(data), CHUNK):
            async with self._writing:
                await self._resumed()
                self._sent.add(data[start : start + CHUNK])
                await self._give([data[start : start + CHUNK]])

    async def close_stdin(self) -> None:
        """Tell the command that no more input comes."""
        self._running()
        async with self._writing:
            await self._resumed()
            self._input_closed = True
            await self._give([])

    async def _give(self, chunks: list[bytes]) -> None:
        """Send input, and its end where it has one; what breaks on the way is sent by who resumes."""
        connection = self._running()
        try:
            await self._pass(connection, chunks)
        except Unavailable as error:
            if error is not connection.failure:
                raise
            await self._resumed()

    async def _pass(self, connection: Connection, chunks: list[bytes]) -> None:
        for chunk in chunks:
            assert self._channel is not None
            await connection.send(protocol.StreamId.STDIN, self._channel, chunk)
        if self._input_closed:
            # on the connection that carried the input: the end must not overtake it
            await connection.post("exec/closeStdin", {"exec": self.id})

    async def _resumed(self) -> None:
        """Wait until the connection stands. Raises what it finally failed with, or that input was lost."""
        if self._resuming is not None:
            await asyncio.wait([self._resuming])
        if self._exit.done() and (error := self._exit.exception()) is not None:
            raise error.with_traceback(None)
        if self._input_failure is not None:
            raise self._input_failure.with_traceback(None)

    async def resize(self, cols: int, rows: int) -> None:
        """Tell the terminal its new size."""
        await self._connections.request("exec/resize", {"exec": self.id, "cols": cols, "rows": rows})

    async def signal(self, signal: str | int) -> None:
        """Send one signal, such as `INT`, to the command itself."""
        await self._connections.request("exec/signal", {"exec": self.id, "signal": signal})

    async def cancel(self, grace: float | None = None) -> Killed:
        """End the whole tree: TERM, `grace` seconds, KILL. Returns when nothing of it is left."""
        params: dict[str, Any] = {"exec": self.id}
        if grace is not None:
            params["graceMs"] = round(grace * 1000)
        # not on our own connection: its answers stand behind output that nobody may be reading
        answer = await self._connections.request("exec/cancel", params)
        return Killed(int(answer["killed"]), bool(answer["escalated"]), int(answer["survivors"]))

    async def wait(self, *, discard: bool = False) -> Exit:
        """Return how the command ended, once its last output is here.

        Output that nobody has begun to read is kept up to its buffer, its end rather than its start, and
        counted in `lost` beyond that. A stream that somebody began to read is waited for, unless
        `discard` says that nobody will read on. Raises `Disconnected` where the connection breaks and is not
        replaced.
        """
        for output in (self.stdout, self.stderr):
            output._waited = True
            output._abandoned |= discard
            output._drop()
        return await asyncio.shield(self._exit)

    async def detach(self) -> None:
        """Let the command run on without us, for as long as its linger time says; `id` finds it again."""
        self._running()
        await self._stop()
        connection, self._detached = self._running(), True
        connection.receiver = None
        self._mark(Disconnected("detached from this command"))
        # closing is detaching, and it needs no answer from behind unread output
        await self._connections.release(connection, good=False)

    async def output(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes]]:
        """Yield the chunks of both streams with their names, as they come. Nobody else may read then."""
        outputs: dict[Literal["stdout", "stderr"], Output] = {"stdout": self.stdout, "stderr": self.stderr}
        for output in outputs.values():
            output._begun = True
        while True:
            self._arrived.clear()
            for name, output in outputs.items():
                while output._chunks:
                    yield name, await anext(output)
            if not any(output._chunks for output in outputs.values()):
                if all(output._ended for output in outputs.values()):
                    for output in outputs.values():
                        if output._error is not None:
                            raise output._error.with_traceback(None)
                    return
                await self._arrived.wait()

    def _running(self) -> Connection:
        if self._connection is None:
            raise Disconnected("a command is used inside its `async with`")
        return self._connection

    # --- coming back ----------------------------------------------------------------------------------

    async def _resume(self, broken: Connection, error: GatewayError) -> None:
        """Attach anew where the output stands; end both streams with the failure where that cannot be."""
        try:
            async with self._connections.patience() as patience:
                while True:
                    await self._connections.release(broken, good=False)
                    await self._connections.pause(patience, error)
                    broken = await self._connections.connect(patience, patient=True)
                    before = self.stdout.offset + self.stderr.offset
                    try:
                        await self._take_place(broken)
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
            self._mark(final)
        except TimeoutError:
            self._mark(Disconnected("the gateway does not let us attach to the command again"))
        finally:
            self._resuming = None

    async def _take_place(self, connection: Connection) -> None:
        """Attach by another connection in place of the one that broke, and send again what it took along."""
        connection.receiver = self
        params = {
            "exec": self.id,
            "from": {"stdout": self.stdout.offset, "stderr": self.stderr.offset},
            **self._reading,
        }
        missing: list[bytes] | None = [] if self._sent.end == 0 else None
        resume = {} if self._attachment is None else {"resume": self._attachment}
        async with asyncio.timeout(START_TIMEOUT):
            try:
                answer = await connection.request("exec/attach", {**params, **resume}, self._started)
            except NotFound:
                if not resume:
                    raise
                # of many readers the gateway forgets the first
                await connection.request("exec/attach", params, self._started)
            else:
                if resume:
                    missing = self._sent.since(int(answer.get("stdin", 0)))
        if missing is None:
            lost = Disconnected("the connection broke, and how much of the input arrived is not known")
            self._input_failure = lost
            return
        await self._pass(connection, missing)

    async def _stop(self) -> None:
        tasks = [task for task in (self._resuming, self._acking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _acknowledge(self) -> None:
        """Tell the gateway what has arrived, as often as it is due; it keeps the rest for a break.

        In a task of its own: while the command's input is full nothing can be sent, and output must still
        be read.
        """
        while True:
            await self._due.wait()
            self._due.clear()
            offsets = {"stdout": self.stdout.offset, "stderr": self.stderr.offset}
            if self._connection is not None:
                with contextlib.suppress(GatewayError):
                    await self._connection.notify("exec/ack", {"exec": self.id, **offsets})

    # --- what the connection brings -------------------------------------------------------------------

    def _started(self, result: Any) -> None:
        self._channel = int(result["channel"])
        self._attachment = result.get("attachment")
        self.id = str(result.get("exec", self.id))
        self.pid = result.get("pid", self.pid)
        self.started_at = result.get("startedAt", self.started_at)
        for name, output in (("stdout", self.stdout), ("stderr", self.stderr)):
            output.offset = int((result.get("from") or {}).get(name, output.offset))
            output.lost += int((result.get("lost") or {}).get(name, 0))

    def frame(self, frame: protocol.Frame) -> None:
        if frame.channel != self._channel:
            return  # the rest of a command that had this connection before
        if frame.stream is protocol.StreamId.STDERR:
            self.stderr._feed(frame.data)
        elif frame.stream is protocol.StreamId.STDOUT:
            self.stdout._feed(frame.data)
        self._arrived.set()
        self._unacked += len(frame.data)
        if self._unacked >= ACK:
            self._unacked = 0
            self._due.set()
            if self._acking is None:
                self._acking = asyncio.create_task(self._acknowledge())

    def notified(self, notification: protocol.Notification) -> None:
        params = notification.params
        if params.get("exec") != self.id:
            return
        if notification.method == "exec/lost":
            output = self.stderr if params.get("stream") == "stderr" else self.stdout
            output.lost += int(params["bytes"])
            output.offset += int(params["bytes"])
        elif notification.method == "exec/detached" and params.get("channel") == self._channel:
            self._mark(from_wire(str(params.get("reason")), "the token does not allow this command any more"))
        elif notification.method == "exec/exited" and not self._exit.done():
            for name, output in (("stdout", self.stdout), ("stderr", self.stderr)):
                missing = int((params.get("offsets") or {}).get(name, output.offset)) - output.offset
                output.lost += max(missing, 0)
            self._exit.set_result(
                Exit(
                    params.get("exitCode"),
                    params.get("signal"),
                    params.get("reason", "lost"),
                    int(params.get("durationMs") or 0),
                    params.get("left"),
                )
            )
            self._mark(None)

    def broken(self, error: GatewayError) -> None:
        if self._connection is None or self._resuming is not None or self._detached:
            return  # who starts, resumes or leaves sees it for itself
        # a reader that stood still for too long was put off, and may come back too
        passing = isinstance(error, Unavailable | RateLimited)
        if passing and not self._exit.done() and self._connections.http.retry is not None:
            self._resuming = asyncio.create_task(self._resume(self._connection, error))
        else:
            self._mark(error)

    async def room(self) -> None:
        await self.stdout._room()
        await self.stderr._room()

    def _mark(self, error: GatewayError | None) -> None:
        """End both streams, and the exit where it has not come, with `error`."""
        if error is not None and not self._exit.done():
            self._exit.set_exception(error)
            self._exit.exception()  # seen: nobody has to wait for the exit
        for output in (self.stdout, self.stderr):
            if not output._ended:
                output._end(error)
        self._arrived.set()
