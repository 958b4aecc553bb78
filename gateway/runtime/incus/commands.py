"""Starts commands in Incus containers, follows them, and ends the whole tree of each.

Every command is an Incus exec of a shell that becomes it (`gateway.runtime.launcher`), in a cgroup of its own
inside the container's tree.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.bounds import Flood, first
from gateway.errors import ExecFailed, GatewayError, InvalidParams, Timeout, Unavailable
from gateway.incus import ExecSockets, Incus, IncusError, Lost, Operation
from gateway.rootfs.command_cgroup import CommandCgroup, lives, of_init
from gateway.rootfs.process_tree import Member, of_command
from gateway.rootfs.workers import BrokerClient
from gateway.runtime import REPORT_MAX, ExecSpec, Exit, Killed, Process, Pty, StreamName
from gateway.runtime.incus.errors import translated
from gateway.runtime.launcher import (
    DRAIN_SCRIPT,
    KILL_SCRIPT,
    KILLED_MAX,
    START_SCRIPT,
    Account,
    Preamble,
    check_size,
    command_line,
    killed,
    start_command,
)
from gateway.runtime.warm_shells import WarmShells
from gateway.settings import Settings

log = logging.getLogger(__name__)

_CGROUP_LOOKS: Final = 40  # two seconds, for a container that is just booting
_LOOK: Final = 0.002  # seconds between two looks at what nothing tells of
_FULL: Final = 0.3  # seconds after which the end of a terminal's command is not merely late
_IN_HAND: Final = (
    0.05  # seconds that incusd has for what it took from its socket, but not yet put into a terminal
)
_MAX_ID: Final = (1 << 31) - 1
_KILL_STARTS: Final = 5.0  # seconds until a script that ends a command has begun
_OURS: Final = (START_SCRIPT, KILL_SCRIPT, DRAIN_SCRIPT)


def is_ours(command: list[str]) -> bool:
    """Return whether an exec's command line is one of the gateway's own shells."""
    return len(command) > 2 and command[2] in _OURS


@dataclass(frozen=True, slots=True)
class _Order:
    """What a waiting shell is to become."""

    spec: ExecSpec
    account: Account
    cwd: str

    def line(self) -> bytes:
        """Return the line that says so. Raises `InvalidParams` for what no line can carry."""
        spec = self.spec
        terminal = spec.pty is not None
        return command_line(
            spec.argv, cwd=self.cwd, env=spec.env, merged=spec.merged and not terminal, terminal=terminal
        )


class Commands:
    """The commands of one gateway in the containers of one Incus.

    `init_pid` returns the host's pid of a container's first process, 0 where it does not run, and raises
    `NotFound`.
    """

    def __init__(self, settings: Settings, incus: Incus, init_pid: Callable[[str], Awaitable[int]]) -> None:
        self.settings = settings
        self._incus = incus
        self._init_pid = init_pid
        self._broker = BrokerClient(at=settings.broker_socket) if settings.broker_socket else None
        self._standbys = WarmShells(
            self._stand_by,
            wanted={False: settings.standby_pipes, True: settings.standby_terminals},
            maximum=settings.standby_max,
            starts=settings.standby_starts,
            delay=settings.standby_delay,
            age=settings.standby_age,
            idle=settings.standby_idle,
        )
        # marks commands of this gateway, in this life or another: another's on the same host are not ours
        self._own = hashlib.sha256(str(settings.state_dir.absolute()).encode()).hexdigest()[:12]
        self._life = f"{self._own}-{secrets.token_hex(4)}"

    async def aclose(self) -> None:
        await self._standbys.aclose()
        if self._broker is not None:
            await self._broker.aclose()

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        settings = self.settings
        check_size(spec.argv, spec.env, one=settings.max_argument, total=settings.max_arguments)
        account = self._account(spec.user)
        cwd = spec.cwd or settings.workspace
        if not cwd.startswith("/"):
            cwd = f"{settings.workspace}/{cwd}"
        order = _Order(spec, account, cwd)
        order.line()  # refuse what no line can carry before anything is started
        # the shells that wait are the workspace user's already
        ours = account == self._account(None)
        waiting = await self._standbys.take(name, spec.pty is not None) if ours else None
        if isinstance(waiting, IncusProcess):
            try:
                await self._hand_over(waiting, order)
                return waiting
            except ExecFailed as error:
                if "reason" in error.facts:  # said by a shell that lives
                    raise
                log.info("a standby of %s had died: starting anew", name)
            except Unavailable:
                log.info("a standby of %s was lost: starting anew", name)
        process = await self._open(name, spec.pty, account)
        await self._hand_over(process, order)
        return process

    def expect(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._standbys.expect(name)

    async def _open(self, name: str, pty: Pty | None, account: Account) -> IncusProcess:
        """Start a shell that takes a command of `account`. Raises what Incus refuses, and `Timeout`."""
        init_pid = await self._init_pid(name)
        exec_id = f"{self._life}/{secrets.token_hex(8)}"
        command = start_command(exec_id, account, looks=_CGROUP_LOOKS, terminal=pty is not None)
        size = None if pty is None else (pty.cols, pty.rows)
        with translated(name), _in_time(name, "incusd"):
            async with asyncio.timeout(self.settings.exec_start_timeout):
                sockets = await self._incus.exec(name, command, pty=size)
        root = await of_init(init_pid) if init_pid else None
        return IncusProcess(
            self, name, exec_id, sockets, None if root is None else self.cgroup(name, root, exec_id)
        )

    async def _hand_over(self, process: IncusProcess, order: _Order) -> None:
        """Have a shell become the command; ends it where it does not."""
        try:
            with _in_time(process.tenant, "command"):
                async with asyncio.timeout(self.settings.exec_start_timeout):
                    await process.begin(order)
        except BaseException:
            await asyncio.shield(process.abandon())
            raise

    async def _stand_by(self, name: str, terminal: bool) -> IncusProcess:
        """Start a shell and return it once it waits for its line."""
        process = await self._open(name, Pty() if terminal else None, self._account(None))
        try:
            with _in_time(name, "shell"):
                async with asyncio.timeout(self.settings.exec_start_timeout):
                    await process.ready()
        except BaseException:
            await asyncio.shield(process.abandon())
            raise
        return process

    async def kill_inside(self, name: str, exec_id: str, grace: float) -> Killed:
        """End a tree by a second command in the container, where the host's cgroups cannot be reached."""
        limit = self.settings.cancel_timeout
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
                "the tenant did not end the command in time; restart the tenant to end all of its processes"
            ) from None
        except (Flood, Lost):
            said = b""
        return killed(said)

    @contextlib.asynccontextmanager
    async def draining(self, name: str, terminal: str) -> AsyncIterator[None]:
        """Drop all input of a terminal while the context is open, `cancel_timeout` seconds at most.

        incusd waits for ever for a terminal that takes nothing: it reads no further, and where the command
        ends meanwhile it never tells.
        """
        command = ["/bin/sh", "-c", DRAIN_SCRIPT, "sh", terminal]
        with translated(name), _in_time(name, "terminal"):
            async with asyncio.timeout(self.settings.cancel_timeout):
                sockets = await self._incus.exec(name, command)
                try:
                    await sockets.read("1")
                    yield
                    await sockets.close_stdin()
                    await sockets.result()
                finally:
                    await sockets.aclose()

    def _account(self, user: str | int | None) -> Account:
        settings = self.settings
        if user is None or user in (settings.workspace_user, settings.workspace_uid):
            uid = settings.workspace_uid
            return Account(settings.workspace_user, uid, uid, f"/home/{settings.workspace_user}")
        if user in ("root", 0, "0"):
            return Account("root", 0, 0, "/root")
        if isinstance(user, int):
            # -1 and its unsigned twin mean "keep", which would be root
            if not 0 < user <= _MAX_ID:
                raise InvalidParams(f"user {user} is out of range", field="user")
            return Account(str(user))
        if not user or len(user) > 256 or user.startswith("-") or not user.isprintable():
            raise InvalidParams("user is a name or a number", field="user")
        if user.isdecimal() and not 0 < int(user) <= _MAX_ID:
            raise InvalidParams(f"user {user} is out of range", field="user")
        return Account(user)

    async def sweep(self, name: str) -> int:
        """End what commands of an earlier life of this gateway left in a running tenant; return how many.

        A gateway that was killed could not end them, and nobody can follow them any more. Commands of this
        life, which may be there already, are told by their folder. Without access to the host's cgroups
        nothing is found.
        """
        ended = 0
        root = await of_init(await self._init_pid(name))
        if root is None:
            return 0
        for life in await lives(root, self._own):
            left = self.cgroup(name, root, life)
            if life == self._life or not await left.reachable():
                continue
            killed = await left.kill(0, self.settings.cancel_timeout)
            ended += killed.killed
            if killed.killed:
                log.warning("ended %d processes left in %s by a gateway that died", killed.killed, name)
        return ended

    def drop(self, name: str | None) -> None:
        """Let go of the shells that wait in a tenant to which something happened, or of all."""
        self._standbys.drop(name)

    def cgroup(self, name: str, container: Path, group: str) -> CommandCgroup:
        """Return a group of commands below a container's, ended by the broker where there is one."""
        path, broker = of_command(container, group), self._broker
        if broker is None:
            return CommandCgroup(path)
        return CommandCgroup(path, lambda step, _: broker.on_tree(name, group, step))


class IncusProcess:
    """One command in a container; see `gateway.runtime.Process`."""

    def __init__(
        self,
        commands: Commands,
        tenant: str,
        exec_id: str,
        sockets: ExecSockets,
        cgroup: CommandCgroup | None,
    ) -> None:
        self.tenant = tenant
        self.pid = 0
        self.started_at = 0.0
        self.streams: tuple[StreamName, ...] = ("stdout",)
        self.report = b""
        self._merged = False
        self._commands = commands
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
        """Return once the shell waits for its line."""
        await self._feed(until_ready=True)

    async def begin(self, order: _Order) -> None:
        """Hand over the command and return once it runs. Raises `ExecFailed`."""
        preamble, spec = self._preamble, order.spec
        preamble.asked(spec.argv[0][:200], order.cwd[:200], order.account.name[:200])
        self._merged = spec.merged and spec.pty is None
        if spec.pty is None and not spec.merged:
            self.streams = ("stdout", "stderr")
        if spec.pty is not None:  # before it is ready, the terminal would echo the line
            await self.ready()
            await self.resize(spec.pty.cols, spec.pty.rows)
        await self._sockets.write(order.line())
        if not spec.stdin and spec.pty is None:
            await self._sockets.close_stdin()
        await self._feed(until_ready=False)
        self.pid, self.started_at, self._first = preamble.pid, time.time(), preamble.rest

    async def _feed(self, *, until_ready: bool) -> None:
        preamble = self._preamble
        while not (preamble.ready if until_ready else preamble.started):
            try:
                data = await self._sockets.read(self._preamble_stream)
            except Lost:
                raise Unavailable("the command's start was lost: the tenant or Incus went away") from None
            if not data:
                raise preamble.ended()
            preamble.feed(data)

    async def read(self, stream: StreamName) -> bytes:
        """See `Process`; of a merged command stderr is the report, which `wait` reads."""
        name = "0" if self._sockets.terminal else ("1" if stream == "stdout" else "2")
        if name == self._preamble_stream and self._first:
            first, self._first = self._first, b""
            return first
        try:
            return await self._sockets.read(name)
        except Lost:
            self._broken = True
            return b""

    async def write(self, data: bytes) -> None:
        await self._sockets.write(data)

    @property
    def unsent(self) -> int:
        return self._sockets.unsent

    async def flush(self) -> None:
        async with self._commands.draining(self.tenant, self._preamble.terminal):
            while self.unsent:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(_LOOK)
            await asyncio.sleep(_IN_HAND)

    async def close_stdin(self) -> None:
        await self._sockets.close_stdin()

    async def resize(self, cols: int, rows: int) -> None:
        # incusd wants the numbers as strings
        size = {"width": str(cols), "height": str(rows)}
        await self._sockets.control({"command": "window-resize", "args": size})

    async def signal(self, number: int) -> None:
        await self._sockets.control({"command": "signal", "signal": number})

    async def wait(self) -> Exit:
        if self._merged:
            while said := await self.read("stderr"):
                self.report = (self.report + said)[:REPORT_MAX]
        try:
            operation = await self._result()
        except IncusError as error:
            raise Unavailable("the command's exit was lost: Incus went away") from error
        code = operation.metadata.get("return")
        if self._broken or not isinstance(code, int) or code < 0:
            raise Unavailable("the command's exit was lost: the tenant went away")
        await self._tidy()
        return Exit.of(code)

    async def _result(self) -> Operation:
        """Return the ended operation, also where incusd still stands before a full terminal."""
        ending = asyncio.ensure_future(self._sockets.result())
        try:
            if self._sockets.terminal:
                await asyncio.wait([ending], timeout=_FULL)
            if not ending.done() and self._sockets.terminal:
                with contextlib.suppress(GatewayError):
                    async with self._commands.draining(self.tenant, self._preamble.terminal):
                        await asyncio.wait([ending], timeout=_FULL * 10)
            return await ending
        finally:
            ending.cancel()

    async def kill(self, grace: float) -> Killed:
        limit = self._commands.settings.cancel_timeout
        cgroup = self._cgroup()
        try:
            if cgroup is not None and await cgroup.reachable():
                ended = await cgroup.kill(grace, limit)
                return Killed(ended.killed, ended.escalated, ended.survivors)
            return await self._commands.kill_inside(self.tenant, self._exec_id, grace)
        finally:
            # a leader that left its cgroup, or whose tenant does not say what it ended; else it has ended
            await self.signal(signal.SIGKILL)

    async def left(self) -> Sequence[Member] | None:
        cgroup = self._cgroup()
        return None if cgroup is None else await cgroup.members()

    async def aclose(self) -> None:
        await self._sockets.aclose()

    async def abandon(self) -> None:
        """End a command that did not start properly: nothing of it may stay.

        The shell first, so that it goes no further, then what it may have become meanwhile.
        """
        limit = self._commands.settings.cancel_timeout
        cgroup = self._cgroup()
        with contextlib.suppress(GatewayError, TimeoutError):
            async with asyncio.timeout(limit):
                await self.signal(signal.SIGKILL)
                if cgroup is not None:
                    await cgroup.kill(0, limit)  # also lets go of the outputs that delay the end
                await self._sockets.result()
                if cgroup is not None:
                    await cgroup.kill(0, limit)
        await self.aclose()

    def _cgroup(self) -> CommandCgroup | None:
        if self._preamble.ready and self._preamble.method != "cgroup":
            return None
        return self._group

    async def _tidy(self) -> None:
        cgroup = self._cgroup()
        if cgroup is not None:
            with contextlib.suppress(Unavailable):  # of a broker; the next start removes it
                await cgroup.remove()


@contextlib.contextmanager
def _in_time(name: str, stage: str) -> Iterator[None]:
    """Turn a passed deadline of a start into our error; the log keeps what was waited for."""
    try:
        yield
    except TimeoutError as error:
        log.warning("a command of %s did not start in time: waited for the %s", name, stage)
        raise Timeout("the command did not start in time; the tenant may be overloaded") from error
