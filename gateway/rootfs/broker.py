"""Knows how to start a worker on a tenant's workspace: the one part of the file tools that needs root.

A small process beside the gateway. It holds no network socket and reads nothing that a tenant wrote: over one
unix socket it takes a few typed requests, and answers each with one JSON object and at most one descriptor.

| request | answer |
|---|---|
| `{"do": "spawn", …}` as `Spawn` | `{"worker": number}` and the worker's socket |
| `{"do": "same", "worker": n}` | `{"same": bool}`: is the workspace still the folder that it was? |
| `{"do": "kill", "worker": n}` | `{"status": …}` once the process has ended: of a program its exit status |
| `{"do": "tree", "tenant", "group", "step"}` | `{}`: did `process_tree.STEPS[step]` on a command's cgroup |
| `{"do": "relieve", "tenant"}` | `{"process", "bytes"}` of the site's biggest, now killed; or `{}` |
| `{"do": "reserve", "tenant"}` | `{}`: its CPU is shared between site and commands, see `reserve` |
| `{"do": "chore", "name": …}` | `{}`: a command of that name, which it was started with, was run |

No request carries a path of the host, an id or a pid: whose files and groups lie where, `tenants` finds out.
A request that fails is answered by `{"error": words}` for the log, or by `{"refused": code, "message",
"facts"}` for the client. Where it does not run as root (the `local` runtime on a laptop) a worker is a plain
child on the folder, and nothing but the safe paths of `tree` confines it.

By `listening` it is a process of its own: each connection gets a fork of it, whose workers end with the
connection.

It is also the zygote: everything that a worker needs is imported before the first fork, so that a worker
starts in milliseconds and shares this process' memory. Of each kind that was asked for one is forked ahead,
and has entered its control group when it learns whose it is to be: the kernel takes some ten milliseconds to
move a process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import orjson

from gateway.errors import GatewayError
from gateway.rootfs import kernel, memory, process_tree, reserve
from gateway.rootfs.confine import Namespaces, Plan, confine, end_with_parent
from gateway.rootfs.locations import Disk, Tenants, found_by
from gateway.rootfs.operation import Limits, Loop, Workspace
from gateway.rootfs.root import Root
from gateway.rootfs.worker import BROKEN, READY, frame, serve
from gateway.rootfs.worker_cgroup import WorkerCgroup, WorkerCgroups, hierarchies

GATEWAYS_MAX = 16  # connections of a listening broker: a gateway has three, its successor as many
MESSAGE_MAX = 64 << 10  # bytes of one request or answer
_SEARCH_NICE = 5  # a third of the share of others; a search still moves on a machine that tenants keep busy
_UNTOUCHED = 256 << 20  # bytes of address space beside what a group counts: libraries, and what is never used
_CHORE_WAIT = 8.0  # seconds, less than a gateway waits for an answer
_PROGRAM_TASKS = 8  # threads that a program may have
_STATUSES_MAX = 256
_BROKEN_WORKER = 70  # exit status, EX_SOFTWARE of sysexits.h: no program's word for anything else
_AHEAD = 0.05  # seconds without a request after which a worker is forked ahead
_ENDS_WITH_PARENT = sys.platform == "linux"  # elsewhere nobody would end one that waits
_KILL_WAIT = 2.0  # seconds for a killed worker to end; one in an uninterruptible wait is reaped later


@dataclass(frozen=True, slots=True)
class Spawn:
    """What a worker is started with: `memory` is in bytes, `loop` what it does.

    The empty `loop` answers calls; the others are named by the operations' module in `LOOPS`. `search` is for
    those that may take long: others' work goes before theirs. One that `looks` can change nothing.
    """

    tenant: str
    workspace: str
    limits: Limits
    memory: int
    loop: str = ""
    search: bool = False
    looks: bool = False

    def wire(self) -> dict[str, Any]:
        return {
            "do": "spawn",
            "tenant": self.tenant,
            "workspace": self.workspace,
            "limits": {name: getattr(self.limits, name) for name in Limits.__slots__},
            "memory": self.memory,
            "loop": self.loop,
            "search": self.search,
            "looks": self.looks,
        }

    @classmethod
    def of(cls, message: dict[str, Any]) -> Spawn:
        """Check and take a request. Raises `ValueError`, `KeyError` or `TypeError` where it is malformed."""
        workspace = str(message["workspace"])
        if workspace != os.path.normpath(workspace) or not workspace.startswith("/") or "\0" in workspace:
            raise ValueError("a workspace is an absolute path")
        memory = message["memory"]
        if not isinstance(memory, int):  # one of a fraction may be too large to be passed on
            raise ValueError("memory is a whole number")
        return cls(
            str(message["tenant"]),
            workspace,
            Limits(**message["limits"]),
            memory,
            str(message["loop"]),
            bool(message["search"]),
            bool(message.get("looks")),  # an older gateway does not say
        )


@dataclass(frozen=True, slots=True)
class _Child:
    pid: int
    disk: Disk
    inode: tuple[int, int]
    group: WorkerCgroup
    program: bool


@dataclass(frozen=True, slots=True)
class _Spare:
    """A forked process that waits at `control` to be told what worker it is."""

    number: int
    pid: int
    control: socket.socket
    group: WorkerCgroup


class Chores:
    """Command lines of the host's that a gateway without root may ask for by name, with nothing to add."""

    def __init__(self, commands: Mapping[str, Sequence[str]], environment: Mapping[str, str]) -> None:
        self._commands = commands
        self._environment = environment

    def do(self, name: str) -> None:
        """Run one to its end. Raises `KeyError`, and `OSError` where it fails or takes too long."""
        command = self._commands[name]
        pid = os.posix_spawn(command[0], list(command), self._environment)
        until = time.monotonic() + _CHORE_WAIT
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise TimeoutError(f"{name} took too long")
            select.select((), (), (), 0.005)
        if ended[1]:
            raise OSError(f"{name} failed")


class Broker:
    """The broker's state: its workers and what it keeps for the next."""

    def __init__(
        self,
        connection: socket.socket,
        operations: str,
        tenants: Tenants,
        program: str = "",
        chores: Chores | None = None,
    ) -> None:
        self._chores = chores
        self._connection = connection
        self._tenants = tenants
        self._privileged = os.geteuid() == 0 and sys.platform == "linux"
        self._namespaces = Namespaces()
        self._groups = WorkerCgroups(hierarchies() if self._privileged else [])
        self._children: dict[int, _Child] = {}
        self._spares: dict[bool, _Spare | None] = {}  # by `search`, of the kinds that were asked for
        self._number = time.time_ns() // 1_000_000  # so that no number is one of a broker's that crashed
        module = importlib.import_module(operations)
        self._operations = module.OPERATIONS
        self._idle = module.idle
        self._loops: dict[str, Loop] = getattr(module, "LOOPS", {})
        self._becoming: Collection[str] = getattr(module, "BECOMING", ())
        self._program = _program(program, self._privileged)
        self._statuses: dict[int, int] = {}  # of programs that ended, until they are asked for

    def run(self) -> None:
        """Serve until the gateway closes its end; then end every worker."""
        preload()
        gc.collect()
        gc.freeze()  # what is shared with the workers stays out of their collections, so pages stay shared
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while True:
            lacking = _ENDS_WITH_PARENT and None in self._spares.values()
            if not poll.poll(_AHEAD * 1000 if lacking else 1000):
                self._reap()
                if lacking:
                    self._fork_ahead()
                continue
            try:
                message = self._connection.recv(MESSAGE_MAX)
                if not message:
                    break
                self._reap()
                self._serve(message)
            except ConnectionError:  # the gateway ended without taking an answer
                break
        for number in list(self._children):
            self._kill(number)
        for spare in self._spares.values():
            if spare is not None:
                self._drop(spare)
        self._groups.close()

    def _serve(self, message: bytes) -> None:
        passed: list[int] = []
        try:
            request = orjson.loads(message)
            match request["do"]:
                case "spawn":
                    number, descriptor = self._spawn(Spawn.of(request))
                    passed.append(descriptor)
                    answer: dict[str, Any] = {"worker": number}
                case "same":
                    answer = {"same": self._same(int(request["worker"]))}
                case "kill":
                    self._kill(int(request["worker"]))
                    answer = {"status": self._statuses.pop(int(request["worker"]), None)}
                case "tree":
                    step = process_tree.STEPS[request["step"]]
                    step(
                        process_tree.of_command(
                            self._tenants.group(str(request["tenant"])), str(request["group"])
                        )
                    )
                    answer = {}
                case "relieve":
                    ended = memory.relieve(self._tenants.group(str(request["tenant"])))
                    answer = {} if ended is None else {"process": ended.name, "bytes": ended.bytes}
                case "reserve":
                    reserve.reserve(self._tenants.group(str(request["tenant"])))
                    answer = {}
                case "chore":
                    if self._chores is None:
                        raise ValueError("no chores")
                    self._chores.do(request["name"])
                    answer = {}
                case _:
                    answer = {"error": "unknown request"}
        except GatewayError as error:
            answer = {"refused": error.code, "message": error.message, "facts": error.facts}
        except (OSError, ValueError, KeyError, TypeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            socket.send_fds(self._connection, [orjson.dumps(answer)], passed)
        finally:
            for descriptor in passed:
                os.close(descriptor)

    @staticmethod
    def _open(disk: Disk) -> int:
        """Open the workspace, following no link in what is the tenant's."""
        flags = os.O_DIRECTORY | os.O_CLOEXEC | (kernel.O_PATH or os.O_RDONLY)
        if disk.real and kernel.HAS_OPENAT2:
            top = kernel.openat2(kernel.AT_FDCWD, os.fsencode(disk.path), flags, kernel.RESOLVE_NO_SYMLINKS)
        else:
            top = os.open(disk.path, flags | os.O_NOFOLLOW)
        try:
            # The folder itself must be real: the tenant owns its parents' content and may swap it.
            return Root(top, "/").open_real(disk.inside, flags)
        finally:
            os.close(top)

    def _same(self, number: int) -> bool:
        child = self._children.get(number)
        if child is None:
            return False
        try:
            descriptor = self._open(child.disk)
        except OSError:
            return False
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return (status.st_dev, status.st_ino) == child.inode

    def _spawn(self, spawn: Spawn) -> tuple[int, int]:
        program = self._program if spawn.loop in self._becoming else None
        if spawn.loop in self._becoming and program is None:
            raise ValueError("no program to become")
        disk = self._tenants.disk(spawn.tenant, spawn.workspace)
        folder = self._open(disk)
        try:
            status = os.fstat(folder)
            plan = None
            # a root of the `local` runtime owns its tenants itself: there is nobody to become
            if self._privileged and (disk.idmap or disk.uid):
                uid, gid = disk.outside(disk.uid, disk.gid)
                namespace = self._namespaces.get(disk.idmap) if disk.idmap and not disk.shifted else None
                file = spawn.limits.write_max
                plan = Plan(
                    *(folder, namespace, uid, gid, spawn.memory, file),
                    read_only=disk.read_only or spawn.looks,
                    covered=disk.covered,
                    program=program,
                )
            ours, theirs = socket.socketpair()
            with theirs:
                spare = self._tell(spawn, plan, ours, theirs, folder)
        finally:
            os.close(folder)
        inode = (status.st_dev, status.st_ino)
        self._children[spare.number] = _Child(spare.pid, disk, inode, spare.group, program is not None)
        return spare.number, ours.detach()

    def _tell(
        self, spawn: Spawn, plan: Plan | None, ours: socket.socket, theirs: socket.socket, folder: int
    ) -> _Spare:
        """Have a forked process be the worker at `theirs`, and return it. `ours` is for the gateway."""
        tasks = 1 if plan is None or plan.program is None else _PROGRAM_TASKS
        passed = [theirs.fileno(), folder]
        told = None
        if plan is not None:
            told = {name: getattr(plan, name) for name in Plan.__slots__}
            if plan.namespace is not None:
                passed.append(plan.namespace)
        while True:
            ahead = self._spares.get(spawn.search)
            spare = ahead or self._fork(search=spawn.search, others=ours)
            self._spares[spawn.search] = None
            message = {"spawn": spawn.wire(), "plan": told, "bounded": spare.group.bound(spawn.memory, tasks)}
            try:
                with spare.control:
                    socket.send_fds(spare.control, [orjson.dumps(message)], passed)
            except OSError:  # it was just killed, by a full machine or a person
                self._drop(spare)
                if ahead is None:
                    raise
            else:
                return spare

    def _fork_ahead(self) -> None:
        for search, spare in self._spares.items():
            if spare is None:
                with contextlib.suppress(OSError):  # of a machine that is full; whose turn it is will be told
                    self._spares[search] = self._fork(search=search)

    def _fork(self, *, search: bool, others: socket.socket | None = None) -> _Spare:
        """Fork a process that waits to be told what worker it is. It does not keep the socket of `others`."""
        self._number += 1
        group = self._groups.new(self._number, search=search)
        ours, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
        )
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                group.remove()
                raise
            if pid == 0:
                ours.close()
                if others is not None:
                    others.close()
                for spare in self._spares.values():
                    if spare is not None:
                        spare.control.close()
                self._become(theirs, group, search=search)
        return _Spare(self._number, pid, ours, group)

    def _drop(self, spare: _Spare) -> None:
        spare.control.close()
        os.kill(spare.pid, signal.SIGKILL)
        os.waitpid(spare.pid, 0)
        spare.group.remove()

    def _become(self, control: socket.socket, group: WorkerCgroup, *, search: bool) -> NoReturn:
        """Be a worker, in the forked child, of whom `control` tells; never return."""
        connection, code = None, _BROKEN_WORKER
        try:
            if _ENDS_WITH_PARENT:
                end_with_parent()
            signal.set_wakeup_fd(-1)
            kernel.take_turns(nice=_SEARCH_NICE if search else 0, short=not search)
            entered = group.enter()
            message, passed, _, _ = socket.recv_fds(control, MESSAGE_MAX, 3)
            if not message:
                raise EOFError
            for descriptor in passed:  # recv_fds leaves them to programs
                os.set_inheritable(descriptor, False)
            connection, folder = socket.socket(fileno=passed[0]), passed[1]
            told = orjson.loads(message)
            spawn = Spawn.of(told["spawn"])
            held = [name for name in entered if name in told["bounded"]]
            layers: tuple[str, ...] = ()
            if told["plan"] is not None:
                namespace = passed[2] if len(passed) > 2 else None
                plan = Plan(**{**told["plan"], "folder": folder, "namespace": namespace})
                if "memory" in held:
                    plan = replace(plan, memory=plan.memory + _UNTOUCHED)
                layers = (*(f"{name} group" for name in held), *confine(plan, keep=connection.fileno()))
                folder = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                control.close()
                self._connection.close()
            depth = spawn.limits.depth_max
            tree = Root(folder, spawn.workspace, nodev=told["plan"] is not None, depth=depth)
            connection.sendall(frame(READY, orjson.dumps(layers)))
            program = self._program if spawn.loop in self._becoming else None
            workspace = Workspace(tree, spawn.limits, program)
            if spawn.loop:
                self._loops[spawn.loop](connection, workspace)
            else:
                serve(connection, workspace, self._operations, self._idle)
            code = 0
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = 0
        except BaseException as error:
            words = f"{type(error).__name__}: {error}"
            try:
                if connection is not None:
                    connection.sendall(frame(BROKEN, words.encode("utf-8", "replace")))
            except OSError:
                code = 2
        finally:
            os._exit(code)

    def _kill(self, number: int) -> None:
        child = self._children.get(number)
        if child is None:
            return
        os.kill(child.pid, signal.SIGKILL)  # still ours: only _reap takes a pid off the list
        until = time.monotonic() + _KILL_WAIT
        while number in self._children and time.monotonic() < until:
            self._reap()
            if number in self._children:
                select.select((), (), (), 0.001)

    def _reap(self) -> None:
        for number, child in list(self._children.items()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                del self._children[number]
                child.group.remove()
                if child.program:
                    while len(self._statuses) >= _STATUSES_MAX:
                        del self._statuses[next(iter(self._statuses))]
                    self._statuses[number] = os.waitstatus_to_exitcode(status)
        for search, spare in self._spares.items():
            if spare is not None and os.waitpid(spare.pid, os.WNOHANG)[0]:
                spare.control.close()
                spare.group.remove()
                self._spares[search] = None


def _program(path: str, privileged: bool) -> int | None:
    """Open the program that workers may become, None where there is none that can be trusted."""
    if not path:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(descriptor)
    trusted = not privileged or (status.st_uid == 0 and not status.st_mode & 0o022)
    if stat.S_ISREG(status.st_mode) and trusted:
        return descriptor
    os.close(descriptor)
    return None


def preload() -> None:
    """Import what is otherwise imported on first use: a confined worker sees no file of Python's."""
    for name in ("ascii", "latin_1", "utf_8", "utf_16", "utf_16_le", "utf_16_be", "unicode_escape", "idna"):
        importlib.import_module(f"encodings.{name}")
        if name != "idna":
            "é".encode(name, "replace")
    for name in ("linecache", "traceback", "tokenize"):
        importlib.import_module(name)


def main(arguments: list[str]) -> None:
    """Run the broker: its arguments are a socket's descriptor, the operations' module, tenants, a program.

    The tenants are JSON for `found_by`. The program, a path or nothing, is what workers of the module's
    `BECOMING` loops turn into.
    """
    descriptor, operations, told, program = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the gateway, which then closes the socket
    connection = socket.socket(fileno=int(descriptor))
    Broker(connection, operations, found_by(orjson.loads(told)), program).run()


def listening(arguments: list[str]) -> NoReturn:
    """Serve gateways at a unix socket until SIGTERM; only processes of root and of `uids` are answered.

    The one argument is a JSON object: `path` of the socket, which will be `gid`'s with mode 0660, in a folder
    that only root may write; `operations`, `tenants`, `program`, `uids`; `chores`, command lines by name,
    which get `environment`. At most `GATEWAYS_MAX` connections are served, more are hung up on. systemd is
    told when connections are taken. Raises `OSError`.
    """
    told = orjson.loads(arguments[0])
    path, operations, gid = str(told["path"]), str(told["operations"]), int(told["gid"])
    tenants, chores = found_by(told["tenants"]), Chores(told["chores"], told["environment"])
    served = {0, *told["uids"]}
    importlib.import_module(operations)
    preload()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # a killed broker's
    mask = os.umask(0o177)
    listener.bind(path)
    os.umask(mask)
    os.chown(path, -1, gid)
    os.chmod(path, 0o660)
    listener.listen(GATEWAYS_MAX)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(0))
    children: set[int] = set()
    _notify_ready()
    try:
        while True:
            listener.settimeout(1.0)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                connection = None
            children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
            if connection is None:
                continue
            with connection:
                # struct ucred: pid, uid, gid, as they were at connect(2); the kernel's word, not the peer's
                ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                _, uid, _ = struct.unpack("iII", ucred)
                if uid not in served or len(children) >= GATEWAYS_MAX:
                    continue
                pid = os.fork()
                if pid == 0:
                    _serve_one(connection, listener, operations, tenants, str(told["program"]), chores)
                children.add(pid)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        for pid in children:
            os.kill(pid, signal.SIGTERM)


def _notify_ready() -> None:
    if address := os.environ.get("NOTIFY_SOCKET"):  # sd_notify(3), of Type=notify
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifying:
            notifying.connect("\0" + address[1:] if address.startswith("@") else address)
            notifying.send(b"READY=1")


def _serve_one(
    connection: socket.socket,
    listener: socket.socket,
    operations: str,
    tenants: Tenants,
    program: str,
    chores: Chores,
) -> NoReturn:
    """Be the broker of one gateway, in the forked child; never return."""
    code = 1
    try:
        listener.close()
        connection.setblocking(True)
        end_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Broker(connection, operations, tenants, program, chores).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
