"""Runs tenants as folders and plain processes of this machine. It isolates nothing.

For laptops without Incus and for fast tests: a tenant is a folder in the state dir, its commands are
processes of the gateway's own user, started by the same shells as in a container and ended through the
same cgroups where this machine has them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import pty
import secrets
import shutil
import signal
import struct
import sys
import termios
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import orjson

from gateway.errors import Conflict, InvalidParams, NotFound, TenantNotRunning, Timeout, Unavailable
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.command_cgroup import CommandCgroup
from gateway.rootfs.locations import Folders
from gateway.rootfs.process_tree import PARENT, Member, mount_point
from gateway.runtime import (
    REPORT_MAX,
    ExecSpec,
    Exit,
    Killed,
    Process,
    Pty,
    Removed,
    Snapshot,
    Space,
    StreamName,
    Tenant,
    TenantEvent,
    unheard,
)
from gateway.runtime.launcher import (
    KILL_SCRIPT,
    Preamble,
    check_size,
    command_line,
    killed,
    start_command,
)
from gateway.runtime.visits import Place, visited
from gateway.settings import Settings

_CHUNK: Final = 64 * 1024
# a child that keeps the output open after the command has ended holds its end back this long, as in Incus
_HOLDER: Final = 1.0
# before a terminal's own 4 KiB there are up to 64 KiB on their way in the kernel
_FLUSHES: Final = 25
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class LocalRuntime:
    """Tenants under `state_dir/tenants`. Use as an async context manager."""

    def __init__(self, settings: Settings, removed: Removed = unheard) -> None:
        self._settings = settings
        self.removed = removed
        self._home = settings.state_dir / "tenants"
        self._real_home = os.path.realpath(self._home)  # what its commands see
        self.tenants: Mapping[str, Any] = Folders(self._real_home, "root").to_dict()
        self._running: dict[str, set[LocalProcess]] = {}
        self._events: asyncio.Queue[TenantEvent] = asyncio.Queue(maxsize=1000)

    async def __aenter__(self) -> LocalRuntime:
        self._home.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._running):
            await self._end_all(name)

    async def list(self) -> list[Tenant]:
        return [
            self._tenant(folder.name)
            for folder in sorted(self._home.iterdir())
            # those that are being made or removed have a dot in front
            if not folder.name.startswith(".") and (folder / "tenant.json").exists()
        ]

    async def get(self, name: str) -> Tenant:
        return self._tenant(name)

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> Tenant:
        await self.make(name, domain)
        if start:
            await self.start(name)
        return self._tenant(name)

    async def make(
        self,
        name: str,
        domain: str | None,
        *,
        disk: Path | None = None,
        site: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a stopped tenant beside its place, whole or not at all. Raises `Conflict`."""
        place = self._home / name
        taken = Conflict(f"tenant {name} already exists; choose another name")
        if place.exists():
            raise taken
        record = {
            "status": "stopped",
            "domain": domain,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "instance": secrets.token_hex(16),
        }
        fresh = self._aside(name)
        try:
            fresh.mkdir()
            if disk is None:
                (fresh / "root" / self._settings.workspace.lstrip("/")).mkdir(parents=True)
            else:
                await self._copy(disk, fresh / "root")
            if site is not None:
                (fresh / "site.json").touch(mode=0o600)
                (fresh / "site.json").write_bytes(orjson.dumps(site))
            (fresh / "tenant.json").write_bytes(orjson.dumps(record))
            fresh.rename(place)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # it came meanwhile
                raise taken from None
            raise
        finally:
            await asyncio.to_thread(shutil.rmtree, fresh, ignore_errors=True)
        self._tell("tenant.created", name)

    def _aside(self, name: str) -> Path:
        return self._home / f".{name}-{secrets.token_hex(8)}"

    def set_site(self, name: str, **facts: Any) -> None:
        """Record the `domain` of a tenant's site, or at which `port` of loopback it answers."""
        self._save(name, {**self._record(name), **facts})

    async def start(self, name: str) -> None:
        if self._record(name)["status"] != "running":
            self._save(name, {**self._record(name), "status": "running"})
            self._tell("tenant.started", name)

    async def stop(self, name: str) -> None:
        if self._record(name)["status"] != "stopped":
            self._save(name, {**self._record(name), "status": "stopped"})
            await self._end_all(name)
            self._tell("tenant.stopped", name)

    async def restart(self, name: str) -> None:
        await self.stop(name)
        await self.start(name)

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        self._save(name, {**self._record(name), "asleep": asleep})
        self._tell("incus.instance-updated", name)

    async def visited(self, tenants: Sequence[Tenant]) -> Mapping[str, float]:
        places = {t.name: Place(t.port, "127.0.0.1") for t in tenants if t.port is not None}
        return await asyncio.to_thread(visited, places)

    async def destroy(self, name: str) -> None:
        if not await self.remove(name, self._record(name).get("instance")):
            raise NotFound(f"no tenant {name}")

    async def remove(self, name: str, instance: str | None) -> bool:
        """Destroy the tenant that has that name and is that instance; say whether there was one."""
        with contextlib.suppress(NotFound):
            if self._record(name).get("instance") == instance:
                await self.stop(name)
            if self._record(name).get("instance") == instance:
                gone = self._aside(name)
                (self._home / name).rename(gone)
                self._tell("tenant.destroyed", name)
                await asyncio.to_thread(shutil.rmtree, gone)
                return True
        return False

    async def rename(self, name: str, domain: str | None) -> None:
        self._save(name, {**self._record(name), "domain": domain})
        self._tell("incus.instance-updated", name)

    async def resize(self, name: str, size: str) -> None:
        self._record(name)
        raise InvalidParams(
            "the local runtime limits nothing, so its tenants have no size; tenants in Incus have",
            field="size",
            reason="not_enforced",
        )

    async def clone(
        self, name: str, new: str, *, domain: str | None = None, snapshot: str | None = None
    ) -> Tenant:
        self._record(name)
        source = self._home / name / "root" if snapshot is None else self._kept(name, snapshot)
        await self.make(new, domain, disk=source)
        await self.start(new)
        return self._tenant(new)

    async def snapshots(self, name: str) -> Sequence[Snapshot]:
        self._record(name)
        folder = self._home / name / "snapshots"
        found = sorted(folder.iterdir(), key=lambda path: path.stat().st_ctime_ns) if folder.exists() else []
        kept = [path for path in found if not path.name.startswith(".")]
        return [await asyncio.to_thread(_snapshot, path) for path in kept]

    async def snapshot(self, name: str, snapshot: str) -> Snapshot:
        self._record(name)
        kept = self._home / name / "snapshots" / snapshot
        if kept.exists():
            raise Conflict(f"tenant {name} has a snapshot {snapshot}; choose another name")
        await self._copy(self._home / name / "root", kept)
        self._tell("tenant.snapshot.created", name, snapshot=snapshot)
        return await asyncio.to_thread(_snapshot, kept)

    async def restore(self, name: str, snapshot: str) -> None:
        ran, kept = self._record(name)["status"] == "running", self._kept(name, snapshot)
        await self.stop(name)
        await self._copy(kept, self._home / name / "root")
        self._tell("incus.instance-restored", name)
        self._tell("tenant.snapshot.restored", name, snapshot=snapshot)
        if ran:
            await self.start(name)

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._kept(name, snapshot))
        self._tell("tenant.snapshot.deleted", name, snapshot=snapshot)

    async def unshared(self, name: str) -> int | None:
        self._record(name)
        return await asyncio.to_thread(_size, self._home / name / "root")

    async def space(self) -> Space | None:
        found = shutil.disk_usage(self._home)
        return Space(found.total, found.used)

    def logs(self, lines: int, follow: bool) -> ExecSpec:
        # beside the root, in which the tenant could put a link in its place
        line = f'exec tail -n {lines} {"-F" if follow else ""} "${{PWD%/root/*}}/site.log" 2>/dev/null'
        return ExecSpec(("sh", "-c", line))

    def _kept(self, name: str, snapshot: str) -> Path:
        self._record(name)
        kept = self._home / name / "snapshots" / snapshot
        if not kept.is_dir():
            raise NotFound(f"tenant {name} has no snapshot {snapshot[:63]}")
        return kept

    async def _copy(self, source: Path, target: Path) -> None:
        """Put a copy of a folder in another's place, whole or not at all."""
        target.parent.mkdir(exist_ok=True)
        fresh, old = (target.with_name(f".{target.name}-{secrets.token_hex(4)}") for _ in range(2))
        argv = ("cp", "--archive", "--reflink=auto", "--", str(source), str(fresh))
        copying = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
        try:
            _, said = await copying.communicate()
            if copying.returncode != 0:
                raise Unavailable(f"the copy failed: {said.decode(errors='replace')[-200:].strip()}")
            await asyncio.to_thread(_replace, target, fresh, old)
        finally:
            if copying.returncode is None:
                copying.kill()
                await copying.wait()
            for left in (fresh, old):
                await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)

    async def filesystem(self, name: str) -> FilesystemRoot:
        self._record(name)
        return FilesystemRoot(name, self._settings.workspace, prefix=f"{self._real_home}/{name}/root")

    async def metrics(self, name: str) -> Mapping[str, Any]:
        self._record(name)
        return {"processes": len(self._running.get(name, ()))}

    async def ready(self) -> None:
        return

    async def watch(self) -> AsyncIterator[TenantEvent]:
        yield TenantEvent("gateway.resynced", None, {"tenants": len(await self.list())})
        while True:
            yield await self._events.get()

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        settings = self._settings
        check_size(spec.argv, spec.env, one=settings.max_argument, total=settings.max_arguments)
        if self._record(name)["status"] != "running":
            raise TenantNotRunning(f"tenant {name} is stopped; start it first", status="stopped")
        if spec.user not in (None, settings.workspace_user, settings.workspace_uid, os.getuid()):
            raise InvalidParams("the local runtime runs commands as its own user only", field="user")
        exec_id = secrets.token_hex(8)
        cwd = self._folder(name, spec.cwd)
        terminal = spec.pty is not None
        line = command_line(
            spec.argv, cwd=cwd, env=spec.env, merged=spec.merged and not terminal, terminal=terminal
        )
        preamble = Preamble()
        preamble.asked(spec.argv[0][:200], (spec.cwd or "")[:200], "")
        process = LocalProcess(exec_id, preamble, settings.cancel_timeout)
        try:
            async with asyncio.timeout(settings.exec_start_timeout):
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

    async def sweep(self) -> int:
        return 0  # what a killed gateway left is not told from other processes of this machine

    def expect(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # a process of our own starts as fast as a waiting one

    def _folder(self, name: str, cwd: str | None) -> str:
        workspace = self._settings.workspace
        home = self._home / name / "root" / workspace.lstrip("/")
        if cwd is None:
            return str(home)
        if cwd == workspace or cwd.startswith(workspace + "/"):
            return str(home / cwd[len(workspace) :].lstrip("/"))
        return str(home / cwd)  # a relative one; an absolute one stays what it is

    def _record(self, name: str) -> dict[str, Any]:
        try:
            record: dict[str, Any] = orjson.loads((self._home / name / "tenant.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"no tenant {name}") from None
        return record

    def _save(self, name: str, record: Mapping[str, Any]) -> None:
        path = self._home / name / "tenant.json"
        temporary = path.with_suffix(".new")
        temporary.write_bytes(orjson.dumps(record))
        temporary.replace(path)

    def _tenant(self, name: str) -> Tenant:
        record = self._record(name)
        return Tenant(
            name=name,
            status=record["status"],
            domain=record.get("domain"),
            port=record.get("port"),
            created=record.get("created"),
            instance=record.get("instance"),
            location="local",
            asleep=record.get("asleep", False),
            idle_stop=record.get("idle_stop"),
        )

    async def _end_all(self, name: str) -> None:
        for process in list(self._running.get(name, ())):
            await process.kill(0)

    def _tell(self, kind: str, name: str, **facts: str) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # nobody watches: nobody misses it
            self._events.put_nowait(TenantEvent(kind, name, facts))


def _replace(target: Path, fresh: Path, old: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    fresh.rename(target)


def _snapshot(kept: Path) -> Snapshot:
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(kept.stat().st_ctime))
    return Snapshot(kept.name, created, _size(kept))


def _size(folder: Path) -> int:
    """Return the bytes that the files in a folder take on the disk."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118
    return total


class LocalProcess:
    """One command on this machine; see `gateway.runtime.Process`."""

    def __init__(self, exec_id: str, preamble: Preamble, limit: float) -> None:
        self.pid = 0
        self.started_at = 0.0
        self.streams: tuple[StreamName, ...] = ("stdout", "stderr")
        self.report = b""
        self._told: StreamName = "stderr"  # where the shells speak before the command does
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
        self._writing = 0  # bytes that a write waits to get rid of
        self._first = b""
        self._over: asyncio.Task[None] | None = None

    async def begin(self, line: bytes, spec: ExecSpec, *, home: str) -> None:
        """Start the shells, hand over the command, return once it runs. Raises `ExecFailed`."""
        # the gateway's own environment, which may hold its secret, stays with the gateway
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
        # pipes of our own: an event loop may use sockets, and nobody can open those as /dev/stdout
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
            own_terminal = (sys.executable, "-c", _OWN_TERMINAL, *argv)
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
                    await asyncio.sleep(0.002)  # nothing tells when it is full again
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

    async def signal(self, number: int) -> None:
        if self._process is not None:
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

    async def kill(self, grace: float) -> Killed:
        cgroup = self._cgroup()
        if cgroup is not None and await cgroup.reachable():
            ended = await cgroup.kill(grace, self._limit)
            return Killed(ended.killed, ended.escalated, ended.survivors)
        milliseconds = [str(int(seconds * 1000)) for seconds in (grace, self._limit)]
        script = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", KILL_SCRIPT, "sh", self._exec_id, *milliseconds,
            stdout=asyncio.subprocess.PIPE, env={"PATH": _PATH},
        )  # fmt: skip
        said, _ = await script.communicate()
        return killed(said)

    async def left(self) -> Sequence[Member] | None:
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
        """End a command that did not start properly: the shell first, so that it goes no further."""
        await self.aclose()
        if self._process is not None:
            await self.kill(0)

    def _cgroup(self) -> CommandCgroup | None:
        preamble = self._preamble
        mount = mount_point() if preamble.method == "cgroup" or not preamble.ready else None
        return None if mount is None else CommandCgroup(mount / PARENT / self._exec_id)


# Incus makes the terminal the session's own; here a Python in between does, and becomes the shell. What was
# started in a background job ignores SIGINT, and so would all that it starts: Ctrl-C must work again.
_OWN_TERMINAL: Final = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
for number in (signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class _End:
    """Our end of a pipe or terminal. `asyncio`'s own transports are not used: uvloop closes their
    descriptors twice.
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
                if error.errno == errno.EIO:  # how a terminal says that nobody holds its other end
                    return b""
                raise
        return b""

    async def write(self, data: bytes) -> None:
        """Write all of `data`; dropped where nobody reads any more. One writer at a time."""
        loop, view = asyncio.get_running_loop(), memoryview(data)
        while view and self.descriptor >= 0:
            try:
                view = view[os.write(self.descriptor, view) :]
            except BlockingIOError:
                await self._until(loop.add_writer, loop.remove_writer)
            except OSError:
                return

    def close(self) -> None:
        """Close it and wake who waits. Idempotent."""
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
