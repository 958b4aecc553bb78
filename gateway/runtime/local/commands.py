"""Commands of the local runtime's tenants."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import math
import os
import pty
import secrets
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from gateway.errors import InvalidParams, TenantNotRunning, Timeout
from gateway.rootfs.command_cgroup import CgroupMember, CommandCgroup
from gateway.rootfs.process_tree import PARENT, mount_point
from gateway.runtime import REPORT_MAX, Adopted, ExecSpec, Exit, Holding, KillResult, Process, Pty, StreamName
from gateway.runtime.launcher import KILL_SCRIPT, Preamble, check_size, command_line, killed, start_command
from gateway.runtime.local.disks import LocalDisks
from gateway.settings import Settings

_CHUNK: Final = 64 * 1024
# seconds to wait for more output after the command's end while a child keeps it open, as in Incus
_HOLDER: Final = 1.0
# besides a terminal's own 4 KiB, the kernel may have up to 64 KiB in transit
_FLUSHES: Final = 25
_OWN_TERMINAL: Final = str(Path(__file__).with_name("own_terminal.py"))
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class LocalProcess:
    """One command on this machine; see `gateway.runtime.Process`."""

    holding: Holding | None = None
    patience: float = math.inf

    def __init__(self, exec_id: str, preamble: Preamble, limit: float) -> None:
        self.pid = 0
        self.started_at = 0.0
        self.streams: tuple[StreamName, ...] = ("stdout", "stderr")
        self.report = b""
        self._told: StreamName = "stderr"  # where the scripts report before the command starts
        self._merged = False
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exec_id = exec_id
        self._preamble = preamble
        self._limit = limit
        self._process: asyncio.subprocess.Process | None = None
        self._outputs: dict[StreamName, _End] = {}
        self._input: _End | None = None
        self._terminal = False
        self._terminal_path = ""
        self._writing = 0  # bytes that a pending `write` is waiting to pass on
        self._first = b""
        self._over: asyncio.Task[None] | None = None

    async def begin(self, line: bytes, spec: ExecSpec, *, home: str) -> None:
        """Start the scripts, send the command, and return once it runs. Raises `ExecFailed`."""
        # not the gateway's own environment, which may contain its secret
        environment = {"PATH": _PATH, "LANG": "C.UTF-8", "HOME": home}
        argv = tuple(start_command(self._exec_id, None, looks=0, terminal=spec.pty is not None))
        preamble = self._preamble
        if spec.pty is None:
            self._process = await self._open_pipes(argv, environment)
            if spec.merged:
                self.streams, self._merged = ("stdout",), True
        else:
            self.streams, self._told = ("stdout",), "stdout"
            self._process = await self._open_terminal(argv, environment, spec.pty)
        self._over = asyncio.create_task(self._watch_end())
        said = self._outputs[self._told]
        if spec.pty is not None:
            await self._feed(said, until_ready=True)
        await self.write(line)
        if spec.pty is None and not spec.stdin:
            await self.close_stdin()
        await self._feed(said, until_ready=False)
        self.pid, self.started_at, self._first = preamble.pid, time.time(), preamble.rest

    async def _open_pipes(
        self, argv: tuple[str, ...], environment: dict[str, str]
    ) -> asyncio.subprocess.Process:
        # explicit pipes: an event loop may use sockets, which cannot be opened as /dev/stdout
        reading, writing = os.pipe()
        self._input = _End(writing)
        theirs = [reading]
        try:
            for name in self.streams:
                reading, writing = os.pipe()
                theirs.append(writing)
                self._outputs[name] = _End(reading)
            return await asyncio.create_subprocess_exec(
                *argv, stdin=theirs[0], stdout=theirs[1], stderr=theirs[2], env=environment, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    async def _open_terminal(
        self, argv: tuple[str, ...], environment: dict[str, str], size: Pty
    ) -> asyncio.subprocess.Process:
        self._terminal = True
        master, slave = pty.openpty()
        self._terminal_path = os.ttyname(slave)
        self._input = self._outputs["stdout"] = _End(master)
        try:
            await self.resize(size.cols, size.rows)
            own_terminal = (sys.executable, "-I", _OWN_TERMINAL, *argv)
            return await asyncio.create_subprocess_exec(
                *own_terminal, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(slave)

    async def _feed(self, said: _End, *, until_ready: bool) -> None:
        preamble = self._preamble
        while not (preamble.ready if until_ready else preamble.started):
            data = await said.read()
            if not data:
                raise preamble.ended()
            preamble.feed(data)

    async def _watch_end(self) -> None:
        assert self._process is not None
        code = await self._process.wait()
        self.ended.set_result(code if code >= 0 else 128 - code)

    async def read(self, stream: StreamName) -> bytes:
        if stream == self._told and self._first:
            first, self._first = self._first, b""
            return first
        reading = asyncio.ensure_future(self._outputs[stream].read())
        both: list[asyncio.Future[Any]] = [reading, self.ended]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await asyncio.wait([reading], timeout=_HOLDER)
            return reading.result() if reading.done() else b""
        finally:
            if not reading.done():
                reading.cancel()

    def take(self, stream: StreamName) -> bytes:
        return b""  # it can safely wait in the pipe

    async def write(self, data: bytes) -> None:
        if self._input is not None:
            writing = asyncio.ensure_future(self._input.write(data))
            both: list[asyncio.Future[Any]] = [writing, self.ended]
            self._writing += len(data)
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._writing -= len(data)
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    @property
    def unsent(self) -> int:
        return self._writing

    async def flush(self) -> None:
        terminal = os.open(self._terminal_path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            async with asyncio.timeout(self._limit):
                after = _FLUSHES
                while after and not self.ended.done():
                    termios.tcflush(terminal, termios.TCIFLUSH)
                    await asyncio.sleep(0.002)  # there is no event for a refilled terminal
                    after = _FLUSHES if self._writing else after - 1
        finally:
            os.close(terminal)

    async def close_stdin(self) -> None:
        if self._terminal:
            await self.write(b"\x04")
        elif self._input is not None:
            self._input.close()

    async def resize(self, cols: int, rows: int) -> None:
        if self._terminal and self._input is not None and self._input.descriptor >= 0:
            window = struct.pack("HHHH", rows, cols, 0, 0)
            fcntl.ioctl(self._input.descriptor, termios.TIOCSWINSZ, window)

    async def signal(self, number: int, *, tree: bool = False) -> None:
        cgroup = self._cgroup() if tree else None
        if cgroup is not None and await cgroup.reachable():
            await cgroup.send(number)
        elif self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def wait(self) -> Exit:
        if self._merged:
            while said := await self.read("stderr"):
                self.report = (self.report + said)[:REPORT_MAX]
        code = await asyncio.shield(self.ended)
        cgroup = self._cgroup()
        if cgroup is not None:
            await cgroup.remove()
        return Exit.of(code)

    async def kill(self, grace: float) -> KillResult:
        cgroup = self._cgroup()
        if cgroup is not None and await cgroup.reachable():
            ended = await cgroup.kill(grace, self._limit)
            return KillResult(ended.killed, ended.escalated, ended.survivors)
        milliseconds = [str(int(seconds * 1000)) for seconds in (grace, self._limit)]
        script = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", KILL_SCRIPT, "sh", self._exec_id, *milliseconds,
            stdout=asyncio.subprocess.PIPE, env={"PATH": _PATH},
        )  # fmt: skip
        said, _ = await script.communicate()
        return killed(said)

    async def left(self) -> Sequence[CgroupMember] | None:
        cgroup = self._cgroup()
        return None if cgroup is None else await cgroup.members()

    async def aclose(self) -> None:
        if self._process is not None and not self.ended.done():
            await self.signal(signal.SIGKILL)
            await asyncio.shield(self.ended)
        for end in (self._input, *self._outputs.values()):
            if end is not None:
                end.close()

    async def abandon(self) -> None:
        """Kill a command that did not start properly: the shell first, so that it goes no further."""
        await self.aclose()
        if self._process is not None:
            await self.kill(0)

    def _cgroup(self) -> CommandCgroup | None:
        preamble = self._preamble
        mount = mount_point() if preamble.method == "cgroup" or not preamble.ready else None
        return None if mount is None else CommandCgroup(mount / PARENT / self._exec_id)


class _End:
    """Our end of a pipe or terminal.

    asyncio's own transports are not used, because uvloop closes their descriptors twice.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._waiting: set[asyncio.Future[None]] = set()

    async def read(self) -> bytes:
        """Return the next bytes, b"" at the end or once closed. One reader at a time."""
        loop = asyncio.get_running_loop()
        while self.descriptor >= 0:
            try:
                return os.read(self.descriptor, _CHUNK)
            except BlockingIOError:
                await self._until(loop.add_reader, loop.remove_reader)
            except OSError as error:
                if error.errno == errno.EIO:  # a terminal's other end is closed
                    return b""
                raise
        return b""

    async def write(self, data: bytes) -> None:
        """Write all of `data`; dropped if there is no reader left. One writer at a time."""
        loop, view = asyncio.get_running_loop(), memoryview(data)
        while view and self.descriptor >= 0:
            try:
                view = view[os.write(self.descriptor, view) :]
            except BlockingIOError:
                await self._until(loop.add_writer, loop.remove_writer)
            except OSError:
                return

    def close(self) -> None:
        """Close it and wake waiting tasks. Idempotent."""
        descriptor, self.descriptor = self.descriptor, -1
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        if descriptor >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(descriptor)
            loop.remove_writer(descriptor)
            os.close(descriptor)

    async def _until(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        descriptor, ready = self.descriptor, asyncio.get_running_loop().create_future()
        self._waiting.add(ready)
        add(descriptor, _resolve, ready)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if self.descriptor == descriptor:
                remove(descriptor)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


_SITE_LOG: Final = Path(__file__).with_name("site_log.sh").read_text()


class LocalCommands:
    """Implements `gateway.runtime.Commands` by processes of the gateway's user."""

    def __init__(self, settings: Settings, disks: LocalDisks) -> None:
        self._settings, self._disks = settings, disks
        self._running: dict[str, set[LocalProcess]] = {}

    async def aclose(self) -> None:
        for name in list(self._running):
            await self.end_all(name)

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        settings = self._settings
        check_size(spec.argv, spec.env)
        if self._disks.get(name).status != "running":
            raise TenantNotRunning(f"tenant {name} is stopped; start it first", status="stopped")
        if spec.user not in (None, settings.workspace_user, settings.workspace_uid, os.getuid()):
            raise InvalidParams("the local runtime runs commands only as its own user", field="user")
        exec_id = secrets.token_hex(8)
        cwd = self._folder(name, spec.cwd)
        merged = spec.merged and spec.pty is None
        line = command_line(spec.argv, cwd=cwd, env=spec.env, merged=merged, pty=spec.pty)
        preamble = Preamble()
        preamble.asked(spec.argv[0][:200], (spec.cwd or "")[:200], "")
        process = LocalProcess(exec_id, preamble, settings.cancel_timeout)
        try:
            async with asyncio.timeout(settings.exec_start_timeout):
                if spec.before is not None:
                    await spec.before(None)
                await process.begin(line, spec, home=self._folder(name, None))
        except BaseException as error:
            await asyncio.shield(process.abandon())
            if isinstance(error, TimeoutError):
                raise Timeout("the command did not start in time") from error
            raise
        running = self._running.setdefault(name, set())
        running.add(process)
        process.ended.add_done_callback(lambda _: running.discard(process))
        return process

    def expect(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # here a new process starts as fast as a warm one

    def logs(self, lines: int, follow: bool) -> ExecSpec:
        return ExecSpec(("/bin/sh", "-c", _SITE_LOG, "sh", str(lines), *(["-F"] if follow else [])))

    async def adopt(self) -> Sequence[Adopted]:
        return ()  # plain processes do not survive the gateway

    def running(self, name: str) -> int:
        """Return how many commands of a tenant run."""
        return len(self._running.get(name, ()))

    async def end_all(self, name: str) -> None:
        """Kill all commands of a tenant."""
        for process in list(self._running.get(name, ())):
            await process.kill(0)

    def _folder(self, name: str, cwd: str | None) -> str:
        workspace = self._settings.workspace
        home = self._disks.home / name / "root" / workspace.lstrip("/")
        if cwd is None:
            return str(home)
        if cwd == workspace or cwd.startswith(workspace + "/"):
            return str(home / cwd[len(workspace) :].lstrip("/"))
        return str(home / cwd)  # an absolute path is left as it is
