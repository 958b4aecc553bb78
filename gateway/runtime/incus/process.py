"""One command in an Incus container: its streams, its exit, killing its tree."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gateway.errors import GatewayError, Timeout, Unavailable
from gateway.incus import RELIEF, ExecSockets, IncusError, Lost, Operation
from gateway.rootfs.command_cgroup import CommandCgroup, Member
from gateway.runtime import REPORT_MAX, Exit, Holding, KillResult, StreamName
from gateway.runtime.incus.held import HeldCommand, cut, reported, socket_of, streams_of
from gateway.runtime.incus.inside import ContainerScripts

_LOOK: Final = 0.002  # seconds between polls where no event exists
_FULL: Final = 0.3  # seconds after which incusd is taken to be blocked by a full terminal
# seconds for incusd to pass on what it has read from its socket but not yet written to the terminal
_IN_HAND: Final = 0.05


class IncusProcess:
    """One command in a container; see `gateway.runtime.Process`."""

    patience: float = RELIEF

    def __init__(
        self,
        inside: ContainerScripts,
        limit: float,
        own: Mapping[str, Any],
        sockets: ExecSockets,
        cgroup: CommandCgroup | None,
        holding: Holding | None,
        first: bytes = b"",
    ) -> None:
        """`own` is what is recorded of it, `first` what was read of it with its shell's last messages."""
        self.tenant = str(own["tenant"])
        self.pid, self.started_at = int(own["pid"]), float(own["started"])
        self.holding = holding
        self.streams = streams_of(own)
        self.report = b""
        self._merged = bool(own.get("merged"))
        self._inside, self._limit = inside, limit
        self._exec_id = str(own["exec"])
        self._terminal = str(own["path"])
        self._sockets = sockets
        self._cgroup = cgroup if own["method"] == "cgroup" else None
        self._first = first
        self._broken = False

    def caught_up(self, own: Mapping[str, Any]) -> dict[StreamName, tuple[int, bytes]]:
        """Return what has arrived of each output, with its start offset. Call once, before `read`."""
        told: dict[StreamName, tuple[int, bytes]] = {}
        for stream in self.streams:
            fd, skip = socket_of(stream, own)
            start = self._sockets.start(fd)
            told[stream] = cut(start, self._sockets.take(fd), skip)
        if self._merged:
            fd, skip = socket_of("stderr", own)
            start = self._sockets.start(fd)
            self.report = reported(*cut(start, self._sockets.take(fd), skip))
        return told

    async def read(self, stream: StreamName) -> bytes:
        """See `Process`. For a merged command, stderr carries the report, which `wait` reads."""
        name = self._socket(stream)
        if self._first and name in ("0", "2"):
            first, self._first = self._first, b""
            return first
        try:
            return await self._sockets.read(name)
        except Lost:
            self._broken = True
            return b""

    def take(self, stream: StreamName) -> bytes:
        return self._sockets.take(self._socket(stream))

    def _socket(self, stream: StreamName) -> str:
        return "0" if self._sockets.terminal else ("1" if stream == "stdout" else "2")

    async def write(self, data: bytes) -> None:
        await self._sockets.write(data)

    @property
    def unsent(self) -> int:
        return self._sockets.unsent

    async def flush(self) -> None:
        async with self._inside.draining(self.tenant, self._terminal):
            while self.unsent:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(_LOOK)
            await asyncio.sleep(_IN_HAND)

    async def close_stdin(self) -> None:
        await self._sockets.close_stdin()

    async def resize(self, cols: int, rows: int) -> None:
        await self._sockets.resize(cols, rows)

    async def signal(self, number: int, *, tree: bool = False) -> None:
        cgroup = self._cgroup if tree else None
        if cgroup is not None and await cgroup.reachable():
            await cgroup.send(number)
        else:
            await self._sockets.signal(number)

    async def wait(self) -> Exit:
        if self._merged:
            while said := await self.read("stderr"):
                self.report = (self.report + said)[:REPORT_MAX]
                if self.holding is not None and len(self.report) == REPORT_MAX:
                    self.holding.keep("stderr", 1 << 62)  # no folder's name: the next process may not know it
        try:
            operation = await self._result()
        except IncusError as error:
            raise Unavailable("the command's exit is unknown: Incus went away") from error
        code = operation.metadata.get("return")
        if self._broken or not isinstance(code, int) or code < 0:
            raise Unavailable("the command's exit is unknown: the tenant went away")
        await self._tidy()
        return Exit.of(code)

    async def _result(self) -> Operation:
        """Wait for the operation's result, draining a full terminal that would block incusd forever."""
        ending = asyncio.ensure_future(self._sockets.result())
        try:
            if self._sockets.terminal:
                await asyncio.wait([ending], timeout=_FULL)
            if not ending.done() and self._sockets.terminal:
                with contextlib.suppress(GatewayError):
                    async with self._inside.draining(self.tenant, self._terminal):
                        await asyncio.wait([ending], timeout=_FULL * 10)
            return await ending
        finally:
            ending.cancel()

    async def kill(self, grace: float) -> KillResult:
        cgroup = self._cgroup
        try:
            if cgroup is not None and await cgroup.reachable():
                ended = await cgroup.kill(grace, self._limit)
                return KillResult(ended.killed, ended.escalated, ended.survivors)
            return await self._inside.kill(self.tenant, self._exec_id, grace)
        finally:
            # for a leader that left its cgroup, or a tenant that gave no answer; otherwise it has ended
            # already
            await self.signal(signal.SIGKILL)

    async def left(self) -> Sequence[Member] | None:
        cgroup = self._cgroup
        return None if cgroup is None else await cgroup.members()

    def leave(self) -> None:
        """Stop reading from and writing to a held command; it keeps running for another process."""
        self._sockets.leave()
        if isinstance(self.holding, HeldCommand):
            self.holding.leave()

    async def aclose(self) -> None:
        await self._sockets.aclose()
        if self.holding is None:
            self._sockets.forgo()

    async def _tidy(self) -> None:
        cgroup = self._cgroup
        if cgroup is not None:
            # the broker is away, or the host is slow: the exit is known all the same
            with contextlib.suppress(Unavailable, Timeout):
                await cgroup.remove()
