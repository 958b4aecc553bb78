"""Fork workers from a process that has imported everything they need, so that they start in milliseconds.

A worker shares this process's memory until it writes. One worker of each requested kind is forked in advance.
It has already entered its cgroup when it learns its tenant, because the kernel takes some ten milliseconds to
move a process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from typing import NoReturn

import orjson

from gateway.rootfs import kernel
from gateway.rootfs.confine import Plan, confine, end_with_parent
from gateway.rootfs.messages import BROKEN, MESSAGE_MAX, READY, Spawn, frame
from gateway.rootfs.worker_cgroup import WorkerCgroup, WorkerCgroups, hierarchies

_SEARCH_NICE = 5  # a third of the others' share; a search still progresses on a busy machine
_UNTOUCHED = 256 << 20  # bytes of address space not counted by the cgroup: libraries, unused memory
_BROKEN_WORKER = 70  # exit status, EX_SOFTWARE of sysexits.h
_ENDS_WITH_PARENT = sys.platform == "linux"  # elsewhere nothing would end a waiting process


@dataclass(frozen=True, slots=True)
class Forked:
    """A forked process that waits on `control` for its parameters as a worker."""

    number: int
    pid: int
    control: socket.socket
    group: WorkerCgroup


class Zygote:
    """Forks workers. One of each requested kind is kept waiting in advance.

    `operations` is the module with the workers' `SERVICE`. A worker without a plan closes `connection`,
    which is the broker's own.
    """

    def __init__(self, connection: socket.socket, operations: str, *, privileged: bool) -> None:
        self._connection = connection
        self._groups = WorkerCgroups(hierarchies() if privileged else [])
        self._spares: dict[bool, Forked | None] = {}  # by `search`, for the kinds requested so far
        self._number = time.time_ns() // 1_000_000  # so that numbers of a crashed broker are not reused
        # a `worker.WorkerService`, from what only workers run
        self._service = importlib.import_module(operations).SERVICE

    def close(self) -> None:
        """End the waiting processes."""
        for spare in self._spares.values():
            if spare is not None:
                self._drop(spare)
        self._groups.close()

    @property
    def lacking(self) -> bool:
        """Whether a worker should be forked in advance."""
        return _ENDS_WITH_PARENT and None in self._spares.values()

    def start(
        self, spawn: Spawn, plan: Plan | None, ours: socket.socket, theirs: socket.socket, folder: int
    ) -> Forked:
        """Turn a forked process into the worker on `theirs`, and return it. `ours` is the gateway's end."""
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
            message = {"spawn": spawn.wire(), "plan": told, "bounded": spare.group.bound(spawn.memory)}
            try:
                with spare.control:
                    socket.send_fds(spare.control, [orjson.dumps(message)], passed)
            except OSError:  # it was just killed, for lack of memory or by a person
                self._drop(spare)
                if ahead is None:
                    raise
            else:
                return spare

    def fork_ahead(self) -> None:
        """Fork the missing workers."""
        for search, spare in self._spares.items():
            if spare is None:
                with contextlib.suppress(OSError):  # out of resources; the next request reports it
                    self._spares[search] = self._fork(search=search)

    def reap(self) -> None:
        """Drop waiting processes that have ended."""
        for search, spare in self._spares.items():
            if spare is not None and os.waitpid(spare.pid, os.WNOHANG)[0]:
                spare.control.close()
                spare.group.remove()
                self._spares[search] = None

    def _fork(self, *, search: bool, others: socket.socket | None = None) -> Forked:
        """Fork a process that waits for its parameters. It closes its copy of the socket `others`."""
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
        return Forked(self._number, pid, ours, group)

    def _drop(self, spare: Forked) -> None:
        spare.control.close()
        os.kill(spare.pid, signal.SIGKILL)
        os.waitpid(spare.pid, 0)
        spare.group.remove()

    def _become(self, control: socket.socket, group: WorkerCgroup, *, search: bool) -> NoReturn:
        """In the forked child, become the worker described on `control`; never returns."""
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
            for descriptor in passed:  # recv_fds makes them inheritable
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
            connection.sendall(frame(READY, orjson.dumps(layers)))
            self._service.run(connection, folder, spawn, nodev=told["plan"] is not None)
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


def preload() -> None:
    """Import modules that are loaded on first use: a confined worker cannot read Python's files."""
    for name in ("ascii", "latin_1", "utf_8", "utf_16", "utf_16_le", "utf_16_be", "unicode_escape", "idna"):
        importlib.import_module(f"encodings.{name}")
        if name != "idna":
            "é".encode(name, "replace")
    for name in ("linecache", "traceback", "tokenize"):
        importlib.import_module(name)
