"""A shell in an Incus container, from its start until it has become its command."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.errors import GatewayError, Unavailable
from gateway.holder.holder import HolderClient
from gateway.incus import ExecSockets, Lost
from gateway.rootfs.command_cgroup import CommandCgroup
from gateway.runtime import ExecSpec
from gateway.runtime.incus.held import HeldCommand
from gateway.runtime.incus.inside import ContainerScripts
from gateway.runtime.incus.process import IncusProcess
from gateway.runtime.launcher import Account, Preamble, command_line


@dataclass(frozen=True, slots=True)
class Assignment:
    """A command for a waiting shell to run."""

    spec: ExecSpec
    account: Account
    cwd: str

    def line(self) -> bytes:
        """Return the line to send to the shell. Raises `InvalidParams` if a line cannot carry it."""
        spec = self.spec
        merged = spec.merged and spec.pty is None
        return command_line(spec.argv, cwd=self.cwd, env=spec.env, merged=merged, pty=spec.pty)


class IncusShell:
    """One shell of ours. `holding` is set from when its command is to outlive this process."""

    def __init__(
        self,
        inside: ContainerScripts,
        limit: float,
        tenant: str,
        exec_id: str,
        sockets: ExecSockets,
        cgroup: CommandCgroup | None,
        holder: HolderClient | None = None,
    ) -> None:
        self.tenant = tenant
        self.holding: HeldCommand | None = None
        self._waiting: HeldCommand | None = None  # what the holder has of it while it waits
        self._holder = holder
        self._inside, self._limit = inside, limit
        self._exec_id = exec_id
        self._sockets = sockets
        self._preamble = Preamble()
        self._fed = 0  # bytes fed to the preamble
        self._group = cgroup

    @classmethod
    def adopted(
        cls,
        inside: ContainerScripts,
        limit: float,
        own: Mapping[str, Any],
        sockets: ExecSockets,
        cgroup: CommandCgroup | None,
        holding: HeldCommand,
    ) -> IncusShell:
        """Continue a shell to which an earlier process was sending its command, from its recorded facts."""
        self = cls(inside, limit, str(own["tenant"]), str(own["exec"]), sockets, cgroup)
        self.holding = holding
        return self

    async def ready(self) -> None:
        """Wait until the shell is ready for its line."""
        await self._feed(until_ready=True)

    def put(self) -> None:
        """Give a shell that waits to the holder, so that this does not delay its command."""
        if (held := self._holdable()) is not None:
            held.prepare()

    async def begin(self, order: Assignment) -> IncusProcess:
        """Send the command and return it once it runs. Raises `ExecFailed`."""
        spec, terminal = order.spec, order.spec.pty is not None
        self._preamble.asked(spec.argv[0][:200], order.cwd[:200], order.account.name[:200])
        if spec.pty is not None:  # a terminal that is not ready yet would echo the line
            await self.ready()
            await self._sockets.resize(spec.pty.cols, spec.pty.rows)
        line, merged = order.line(), spec.merged and not terminal
        if spec.outlive and (held := self._holdable()) is not None:
            held.runs({**self._own(merged), "starting": len(line)})
            self.holding = held
        else:
            self._withdraw()
        if spec.before is not None:
            await spec.before(self.holding)
        await self._sockets.write(line, end=not spec.stdin and not terminal)
        process = await self._become(merged)
        if process.holding is None:
            self._sockets.forgo()
        return process

    def was_told(self, starting: int) -> bool:
        """Return whether an earlier process has sent the command's whole line, of `starting` bytes."""
        return self._sockets.position >= starting

    async def go_on(self, own: Mapping[str, Any], *, stdin: bool) -> IncusProcess:
        """Return the command that an earlier process sent, once it runs. Raises what `begin` raises."""
        if not stdin and not self._sockets.terminal:  # once more does no harm
            await self._sockets.close_stdin()
        return await self._become(bool(own.get("merged")))

    async def _become(self, merged: bool) -> IncusProcess:
        await self._feed(until_ready=False)
        first = self._preamble.rest  # the command's own output that came with the preamble
        own = self._own(merged, time.time(), self._fed - len(first))
        if self.holding is not None:
            self.holding.runs(own)
        return IncusProcess(self._inside, self._limit, own, self._sockets, self._group, self.holding, first)

    def _own(self, merged: bool, started: float = 0.0, skip: int = 0) -> dict[str, Any]:
        """Return what another gateway process needs to continue the command; see `IncusProcess`."""
        return {
            "tenant": self.tenant,
            "exec": self._exec_id,
            "pid": self._preamble.pid,
            "started": started,
            "terminal": self._sockets.terminal,
            "merged": merged,
            "path": self._preamble.terminal,
            "method": self._preamble.method,
            "cgroup": None if self._group is None else str(self._group.path),
            "skip": skip,
        }

    async def _feed(self, *, until_ready: bool) -> None:
        preamble = self._preamble
        while not (preamble.ready if until_ready else preamble.started):
            try:
                data = await self._sockets.read("0" if self._sockets.terminal else "2")
            except Lost:
                raise Unavailable("lost the command at its start: the tenant or Incus went away") from None
            if not data:
                raise preamble.ended()
            self._fed += len(data)
            preamble.feed(data)

    # --- its place at the holder ----------------------------------------------------------------------

    def _holdable(self) -> HeldCommand | None:
        memory = self._sockets.memory
        if self._waiting is None and memory is not None and self._holder is not None:
            self._waiting = HeldCommand(self._holder, f"command/{self._exec_id}", memory, self._sockets, {})
        return self._waiting

    def _withdraw(self) -> None:
        if self._waiting is not None:
            self._waiting.withdraw()
            self._waiting = None

    def leave(self) -> None:
        """Stop reading from and writing to it; it continues for another process."""
        self._sockets.leave()
        if self.holding is not None:
            self.holding.leave()

    # --- its end --------------------------------------------------------------------------------------

    async def abandon(self) -> None:
        """Kill a shell, or a command that did not start properly, leaving nothing behind."""
        await self.end()
        if self.holding is not None:
            self.holding.drop()
            self.holding = self._waiting = None

    async def end(self) -> None:
        """Kill it, but leave its facts to the holder.

        First the shell, so that it goes no further, then whatever it has started meanwhile.
        """
        without = self._preamble.ready and self._preamble.method != "cgroup"
        cgroup = None if without else self._group
        with contextlib.suppress(GatewayError, TimeoutError):
            async with asyncio.timeout(self._limit):
                await self._sockets.signal(signal.SIGKILL)
                if cgroup is not None:
                    await cgroup.kill(0, self._limit)  # also closes the outputs, which delay the end
                await self._sockets.result()
                if cgroup is not None:
                    await cgroup.kill(0, self._limit)
        await self.aclose()

    async def aclose(self) -> None:
        """Close the sockets. Idempotent."""
        await self._sockets.aclose()
        if self.holding is None:
            self._withdraw()
            self._sockets.forgo()
