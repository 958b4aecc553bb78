"""One command in an Incus container: its streams, its exit, killing its tree."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from gateway.bounds import Flood, first
from gateway.errors import GatewayError, Timeout, Unavailable
from gateway.holder.holder import HolderClient
from gateway.incus import RELIEF, ExecMemory, ExecSockets, Incus, IncusError, Lost, Operation, outputs
from gateway.rootfs.command_cgroup import CgroupMember, CommandCgroup
from gateway.runtime import REPORT_MAX, Exit, Holding, KillResult, StreamName
from gateway.runtime.incus.errors import in_time, translated
from gateway.runtime.launcher import DRAIN_SCRIPT, KILL_SCRIPT, KILLED_MAX, killed
from gateway.settings import Settings

_KILL_STARTS: Final = 5.0  # seconds for the kill script to start


class ContainerScripts:
    """Actions on a gateway's commands that run inside their containers."""

    def __init__(self, settings: Settings, incus: Incus) -> None:
        self._incus, self._limit = incus, settings.cancel_timeout

    async def kill(self, name: str, exec_id: str, grace: float) -> KillResult:
        """Kill a process tree from inside the container, if the host's cgroups are not accessible."""
        limit = self._limit
        milliseconds = [str(int(seconds * 1000)) for seconds in (grace, limit)]
        command = ["/bin/sh", "-c", KILL_SCRIPT, "sh", exec_id, *milliseconds]
        try:
            with translated(name):
                async with asyncio.timeout(grace + limit + _KILL_STARTS):
                    sockets = await self._incus.exec(name, command)
                    try:
                        await sockets.close_stdin()
                        said = await first(lambda: sockets.read("1"), KILLED_MAX, most=KILLED_MAX)
                        await sockets.result()
                    finally:
                        await sockets.aclose()
        except TimeoutError:
            raise Timeout(
                "the tenant did not end the command in time; restart the tenant to end all its processes"
            ) from None
        except (Flood, Lost):
            said = b""
        return killed(said)

    @contextlib.asynccontextmanager
    async def draining(self, name: str, terminal: str) -> AsyncIterator[None]:
        """Discard all input of a terminal while the context is open, at most `cancel_timeout` seconds.

        incusd waits forever for a terminal that accepts no input: it reads nothing else, and never reports
        the end of the command.
        """
        command = ["/bin/sh", "-c", DRAIN_SCRIPT, "sh", terminal]
        with translated(name), in_time(name, "terminal"):
            async with asyncio.timeout(self._limit):
                sockets = await self._incus.exec(name, command)
                try:
                    await sockets.read("1")
                    yield
                    await sockets.close_stdin()
                    await sockets.result()
                finally:
                    await sockets.aclose()


FORMAT: Final = 1  # version of the facts; other versions are not adopted


class HeldCommand:
    """Implements `gateway.runtime.Holding`. `own` are the runtime's facts; the registry adds its own.

    A shell that waits for its command has none yet. `sockets` is None once the command has ended. One output
    starts with bytes that are not the command's own.
    """

    def __init__(
        self,
        holder: HolderClient,
        name: str,
        memory: ExecMemory,
        sockets: ExecSockets | None,
        own: Mapping[str, Any],
    ) -> None:
        self._holder = holder
        self._name = name
        self._memory = memory
        self._accounts = memory.record("accounts")
        self._sockets = sockets
        self._own = own
        self._put = False
        self._left = False

    def leave(self) -> None:
        """Write nothing more into the memory, which another process continues with."""
        self._left = True

    @property
    def _over(self) -> bool:
        return self._left or self._memory.closed

    @property
    def position(self) -> int:
        return 0 if self._sockets is None else self._sockets.position

    @property
    def safe(self) -> bool:
        return self._holder.there

    def runs(self, own: Mapping[str, Any]) -> None:
        """Replace the runtime's facts, from the next `note` on."""
        self._own = own

    def prepare(self) -> None:
        """Do in advance what would delay a start."""
        self._memory.prepare()
        self._put_descriptors()

    def go_on(self) -> None:
        """Take over what an earlier process gave to the holder."""
        if self._sockets is not None:
            self._put = True
            self._holder.keep(self._name, self._sockets.descriptors)

    def _put_descriptors(self) -> None:
        """Give the descriptors to the holder, unless it has them."""
        if not self._put and self._sockets is not None:
            self._put = True
            self._holder.put(self._name, self._sockets.descriptors)

    def withdraw(self) -> None:
        """Take the descriptors back: what they belong to is not to outlive this process."""
        if self._put and not self._over:
            self._holder.drop(self._name, soon=True)

    def note(self, facts: Mapping[str, Any]) -> None:
        if self._over:
            return
        self._memory.write_facts({"format": FORMAT, "own": dict(self._own), "facts": dict(facts)})
        self._put_descriptors()

    def end(self, facts: Mapping[str, Any]) -> None:
        if self._over:
            return
        if self._sockets is not None:
            self._sockets.ended()
        self._sockets = None
        self.note(facts)
        self._holder.put(self._name, [self._memory.descriptor], soon=True)

    def keep(self, stream: StreamName, offset: int) -> int:
        if self._sockets is None or self._left:
            return 0
        fd, skip = socket_of(stream, self._own)
        return self._sockets.keep(fd, offset + skip)

    def accounts(self) -> bytes:
        return self._accounts.read()

    def account(self, accounts: bytes) -> None:
        if not self._over:
            self._accounts.write(accounts)

    def purpose(self) -> Mapping[str, Any]:
        try:
            return self._memory.read_facts("purpose")
        except ValueError:  # none was noted
            return {}

    def note_purpose(self, facts: Mapping[str, Any]) -> None:
        if not self._over:
            self._memory.write_facts(facts, "purpose")

    def begin_with(self, at: int, data: bytes) -> None:
        if not self._over:
            self._memory.beginning[at : at + len(data)] = data

    def beginning(self, size: int) -> bytes:
        return bytes(self._memory.beginning[:size])

    def drop(self) -> None:
        if not self._over:
            self._holder.drop(self._name)
            self._memory.close()


def socket_of(stream: StreamName, own: Mapping[str, Any]) -> tuple[str, int]:
    """Return the socket of an output, and how many bytes on it precede the command's own."""
    fd = "0" if own["terminal"] else ("1" if stream == "stdout" else "2")
    return fd, int(own["skip"]) if fd in ("0", "2") else 0


def cut(start: int, data: bytes, skip: int) -> tuple[int, bytes]:
    """Remove the first `skip` bytes of the stream from an output and from its start offset."""
    return max(0, start - skip), data[max(0, skip - start) :]


def streams_of(own: Mapping[str, Any]) -> tuple[StreamName, ...]:
    """Return which outputs a command has; a merged one's other socket brings its report."""
    return ("stdout",) if own["terminal"] or own.get("merged") else ("stdout", "stderr")


def kept(memory: ExecMemory, own: Mapping[str, Any]) -> tuple[dict[StreamName, tuple[int, bytes]], bytes]:
    """Return the outputs that are kept of an ended command, and its report. Raises `ValueError`."""
    found = outputs(memory, terminal=bool(own["terminal"]))
    told: dict[StreamName, tuple[int, bytes]] = {}
    for stream in streams_of(own):
        fd, skip = socket_of(stream, own)
        told[stream] = cut(*found[fd], skip)
    if not own.get("merged"):
        return told, b""
    fd, skip = socket_of("stderr", own)
    return told, reported(*cut(*found[fd], skip))


def reported(start: int, data: bytes) -> bytes:
    """Return a report by what is kept of it; one whose front is gone was too long to say anything."""
    return bytes(REPORT_MAX) if start else data[:REPORT_MAX]


def close(descriptors: list[int]) -> None:
    """Close descriptors, ignoring errors."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


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

    async def left(self) -> Sequence[CgroupMember] | None:
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
