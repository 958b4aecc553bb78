"""One command in an Incus container: its streams, its exit, killing its tree."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import GatewayError, Timeout, Unavailable
from gateway.holder.holder import Holder
from gateway.incus import RELIEF, ExecSockets, IncusError, Lost, Operation
from gateway.rootfs.command_cgroup import CommandCgroup
from gateway.rootfs.process_tree import Member
from gateway.runtime import REPORT_MAX, ExecSpec, Exit, Holding, Killed, StreamName
from gateway.runtime.incus.held import Held, cut, reported, socket_of, streams_of
from gateway.runtime.incus.inside import Inside
from gateway.runtime.launcher import Account, Preamble, command_line

_LOOK: Final = 0.002  # seconds between polls where no event exists
_FULL: Final = 0.3  # seconds after which incusd is taken to be blocked by a full terminal
# seconds for incusd to pass on what it has read from its socket but not yet written to the terminal
_IN_HAND: Final = 0.05


@dataclass(frozen=True, slots=True)
class Assignment:
    """A command for a waiting shell to run."""

    spec: ExecSpec
    account: Account
    cwd: str

    def line(self) -> bytes:
        """Return the line to send to the shell. Raises `InvalidParams` if a line cannot carry it."""
        spec = self.spec
        terminal = spec.pty is not None
        return command_line(
            spec.argv, cwd=self.cwd, env=spec.env, merged=spec.merged and not terminal, terminal=terminal
        )


class IncusProcess:
    """One command in a container; see `gateway.runtime.Process`."""

    patience: float = RELIEF

    def __init__(
        self,
        inside: Inside,
        limit: float,
        tenant: str,
        exec_id: str,
        sockets: ExecSockets,
        cgroup: CommandCgroup | None,
        holder: Holder | None = None,
    ) -> None:
        self.tenant = tenant
        self.pid = 0
        self.started_at = 0.0
        self.holding: Holding | None = None
        self._held: Held | None = None  # the same, and there while a shell waits
        self._holder = holder
        self._fed = 0  # bytes fed to the preamble
        self._sending: asyncio.Task[None] | None = None  # sends the input an earlier process accepted last
        self.streams: tuple[StreamName, ...] = ("stdout",)
        self.report = b""
        self._merged = False
        self._inside, self._limit = inside, limit
        self._exec_id = exec_id
        self._sockets = sockets
        self._preamble = Preamble()
        self._group = cgroup
        self._first = b""  # the command's own output that came with the preamble
        self._broken = False

    @property
    def _preamble_stream(self) -> str:
        return "0" if self._sockets.terminal else "2"

    async def ready(self) -> None:
        """Wait until the shell is ready for its line."""
        await self._feed(until_ready=True)

    def put(self) -> None:
        """Give a shell that waits to the holder, so that this does not delay its command."""
        if (held := self._holdable()) is not None:
            held.prepare()

    async def begin(self, order: Assignment) -> None:
        """Send the command and return once it runs. Raises `ExecFailed`."""
        preamble, spec = self._preamble, order.spec
        preamble.asked(spec.argv[0][:200], order.cwd[:200], order.account.name[:200])
        self._merged = spec.merged and spec.pty is None
        if spec.pty is None and not spec.merged:
            self.streams = ("stdout", "stderr")
        if spec.pty is not None:  # a terminal that is not ready yet would echo the line
            await self.ready()
            await self.resize(spec.pty.cols, spec.pty.rows)
        line = order.line()
        if spec.outlive and (held := self._holdable()) is not None:
            held.runs({**self._facts(0), "starting": len(line)})
            self.hold(held)
        else:
            self._withdraw()
        if spec.before is not None:
            await spec.before(self.holding)
        await self._sockets.write(line, end=not spec.stdin and spec.pty is None)
        await self._feed(until_ready=False)
        self._begun()
        if self.holding is None:
            self._sockets.forgo()

    def hold(self, held: Held) -> None:
        """Have it outlive this process."""
        self.holding = self._held = held

    def _withdraw(self) -> None:
        if self._held is not None:
            self._held.withdraw()
            self._held = None

    def _holdable(self) -> Held | None:
        memory = self._sockets.memory
        if self._held is None and memory is not None and self._holder is not None:
            self._held = Held(self._holder, f"command/{self._exec_id}", memory, self._sockets, {})
        return self._held

    def _begun(self) -> None:
        preamble = self._preamble
        self.pid, self.started_at, self._first = preamble.pid, time.time(), preamble.rest
        if self._held is not None:
            self._held.runs(self._facts(self._fed - len(preamble.rest)))

    def _facts(self, skip: int) -> dict[str, Any]:
        """Return what another gateway process needs to continue the command: see `adopted`."""
        return {
            "tenant": self.tenant,
            "exec": self._exec_id,
            "pid": self.pid,
            "started": self.started_at,
            "terminal": self._sockets.terminal,
            "merged": self._merged,
            "path": self._preamble.terminal,
            "method": self._preamble.method,
            "cgroup": None if self._group is None else str(self._group.path),
            "skip": skip,
        }

    @classmethod
    def adopted(
        cls,
        inside: Inside,
        limit: float,
        own: Mapping[str, Any],
        sockets: ExecSockets,
        cgroup: CommandCgroup | None,
    ) -> IncusProcess:
        """Continue a command of an earlier process from its recorded facts."""
        self = cls(inside, limit, str(own["tenant"]), str(own["exec"]), sockets, cgroup)
        self._sending = asyncio.create_task(sockets.flush(), name=f"input of {self._exec_id}")
        self.streams, self._merged = streams_of(own), bool(own.get("merged"))
        if "starting" not in own:
            self.pid, self.started_at = int(own["pid"]), float(own["started"])
            self._preamble.went(self.pid, own["method"], str(own["path"]))
        return self

    def was_told(self, starting: int) -> bool:
        """Return whether an earlier process has sent the whole line, of so many bytes, of what to run."""
        return self._sockets.position >= starting

    async def go_on(self, *, stdin: bool) -> None:
        """Return once a command runs that an earlier process sent to a shell. Raises what `begin` raises."""
        if not stdin and not self._sockets.terminal:  # once more does no harm
            await self._sockets.close_stdin()
        await self._feed(until_ready=False)
        self._begun()

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

    async def _feed(self, *, until_ready: bool) -> None:
        preamble = self._preamble
        while not (preamble.ready if until_ready else preamble.started):
            try:
                data = await self._sockets.read(self._preamble_stream)
            except Lost:
                raise Unavailable("lost the command at its start: the tenant or Incus went away") from None
            if not data:
                raise preamble.ended()
            self._fed += len(data)
            preamble.feed(data)

    async def read(self, stream: StreamName) -> bytes:
        """See `Process`. For a merged command, stderr carries the report, which `wait` reads."""
        name = self._socket(stream)
        if name == self._preamble_stream and self._first:
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
        async with self._inside.draining(self.tenant, self._preamble.terminal):
            while self.unsent:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(_LOOK)
            await asyncio.sleep(_IN_HAND)

    async def close_stdin(self) -> None:
        await self._sockets.close_stdin()

    async def resize(self, cols: int, rows: int) -> None:
        # incusd expects strings
        size = {"width": str(cols), "height": str(rows)}
        await self._sockets.control({"command": "window-resize", "args": size})

    async def signal(self, number: int) -> None:
        await self._sockets.control({"command": "signal", "signal": number})

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
                    async with self._inside.draining(self.tenant, self._preamble.terminal):
                        await asyncio.wait([ending], timeout=_FULL * 10)
            return await ending
        finally:
            ending.cancel()

    async def kill(self, grace: float) -> Killed:
        cgroup = self._cgroup()
        try:
            if cgroup is not None and await cgroup.reachable():
                ended = await cgroup.kill(grace, self._limit)
                return Killed(ended.killed, ended.escalated, ended.survivors)
            return await self._inside.kill(self.tenant, self._exec_id, grace)
        finally:
            # for a leader that left its cgroup, or a tenant that gave no answer; otherwise it has ended
            # already
            await self.signal(signal.SIGKILL)

    async def left(self) -> Sequence[Member] | None:
        cgroup = self._cgroup()
        return None if cgroup is None else await cgroup.members()

    def leave(self) -> None:
        """Stop following a command that is held, and writing to it; it runs on for another process."""
        if self._sending is not None:
            self._sending.cancel()
        self._sockets.leave()
        if isinstance(self.holding, Held):
            self.holding.leave()

    async def aclose(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        await self._sockets.aclose()
        if self.holding is None:
            self._withdraw()
            self._sockets.forgo()

    async def abandon(self) -> None:
        """Kill a command that did not start properly, leaving nothing behind."""
        await self.end_shell()
        if self.holding is not None:
            self.holding.drop()
            self.holding = self._held = None

    async def end_shell(self) -> None:
        """Kill a command that did not start properly, but leave what is known of it to its holder.

        First the shell, so that it goes no further, then whatever it has started meanwhile.
        """
        cgroup = self._cgroup()
        with contextlib.suppress(GatewayError, TimeoutError):
            async with asyncio.timeout(self._limit):
                await self.signal(signal.SIGKILL)
                if cgroup is not None:
                    await cgroup.kill(0, self._limit)  # also closes the outputs, which delay the end
                await self._sockets.result()
                if cgroup is not None:
                    await cgroup.kill(0, self._limit)
        await self.aclose()

    def _cgroup(self) -> CommandCgroup | None:
        if self._preamble.ready and self._preamble.method != "cgroup":
            return None
        return self._group

    async def _tidy(self) -> None:
        cgroup = self._cgroup()
        if cgroup is not None:
            # the broker is away, or the host is slow: the exit is known all the same
            with contextlib.suppress(Unavailable, Timeout):
                await cgroup.remove()
