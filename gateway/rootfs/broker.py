"""Start workers on tenants' workspaces: the only part of the file tools that needs root.

A small process beside the gateway. It has no network socket and reads nothing written by tenants. It accepts
a few typed requests on a unix socket and answers each with one JSON object and at most two descriptors.

| request | answer |
|---|---|
| `{"do": "spawn", …}` as `Spawn` | `{"worker": number}` and the worker's socket |
| `{"do": "same", "worker": n}` | `{"same": bool}`: is the workspace still the same folder? |
| `{"do": "kill", "worker": n}` | `{}` once the process has ended |
| `{"do": "tree", "tenant", "group", "step"}` | `{}` after `process_tree.STEPS[step]` on a command's cgroup |
| `{"do": "pipes", "tenant", "group"}` | `{}` and the outputs of a command, see `process_tree` |
| `{"do": "relieve", "tenant"}` | `{"process", "bytes"}` of the site's biggest process, now killed; or `{}` |
| `{"do": "reserve", "tenant"}` | `{}`: its CPU is divided between site and commands, see `site_cgroup` |
| `{"do": "break_off", "tenant", "port", "leave"}` | `{"ended": n}` connections that it does not read |
| `{"do": "bind_ports", "tenant"}` | `{}`: its MAC address is bound to its port, see `bridge_port` |
| `{"do": "cut_off", "member": "HOST:PORT"}` | `{"ended": n}` connections with it, see `connections` |
| `{"do": "changed", "tenant", "workspace", "since"}` | `{"changed": bool}` since a snapshot: `btrfs` |
| `{"do": "quotas"}` | `{"changed": [words], "read_ahead": words}`: the disk quotas are
  enforced, see `quotas`, reading ahead is bounded, see `btrfs.READ_AHEAD`, and folders of the host that were
  shown to tenants that are gone are unmounted, see `shown_folders` |
| `{"do": "free_disks"}` | `{}` once what was deleted counts no more for these limits |
| `{"do": "limit_disk", "instance", "ending", "standby"}` | `{"counted": bytes or null}`: its disk is so |

No request contains a host path, an id or a pid: `locations` finds the files and cgroups of a tenant. A failed
request is answered by `{"error": words}` for the log, or by `{"refused": code, "message", "facts"}` for the
client. If the broker does not run as root (the `local` runtime on a laptop), a worker is a plain child
process, confined only by the safe paths of `root`.

Workers are forked from this process, see `zygote`. With `listening` it runs as a separate service.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import orjson

from gateway.errors import GatewayError
from gateway.rootfs import connections, kernel, process_tree, site_cgroup
from gateway.rootfs.btrfs import bound_read_ahead, changed_since
from gateway.rootfs.confine import Namespaces, Plan, end_with_parent
from gateway.rootfs.connections import cut_off
from gateway.rootfs.locations import Disk, TenantLocator, found_by
from gateway.rootfs.messages import MESSAGE_MAX, Spawn
from gateway.rootfs.quotas import Quotas
from gateway.rootfs.worker_cgroup import WorkerCgroup
from gateway.rootfs.zygote import Zygote, preload

_AHEAD = 0.05  # seconds without a request before a worker is forked in advance
_KILL_WAIT = 2.0  # seconds for a killed worker to end; one in uninterruptible sleep is reaped later


@dataclass(frozen=True, slots=True)
class _Child:
    pid: int
    disk: Disk
    inode: tuple[int, int]
    group: WorkerCgroup


class Broker:
    """The broker: its workers and prepared ones."""

    def __init__(
        self,
        connection: socket.socket,
        operations: str,
        tenants: TenantLocator,
    ) -> None:
        self._connection = connection
        self._tenants = tenants
        self._privileged = os.geteuid() == 0 and sys.platform == "linux"
        self._namespaces = Namespaces()
        self._children: dict[int, _Child] = {}
        self._zygote = Zygote(connection, operations, privileged=self._privileged)

    def run(self) -> None:
        """Serve until the gateway closes its end; then kill all workers."""
        preload()
        gc.collect()
        gc.freeze()  # keeps the objects shared with workers out of their collections, so pages stay shared
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while True:
            lacking = self._zygote.lacking
            if not poll.poll(_AHEAD * 1000 if lacking else 1000):
                self._reap()
                if lacking:
                    self._zygote.fork_ahead()
                continue
            try:
                message = self._connection.recv(MESSAGE_MAX)
                if not message:
                    break
                self._reap()
                self._serve(message)
            except ConnectionError:  # the gateway ended without reading an answer
                break
        for number in list(self._children):
            self._kill(number)
        self._zygote.close()

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
                    answer = {}
                case "tree":
                    step = process_tree.STEPS[request["step"]]
                    step(self._command(request))
                    answer = {}
                case "pipes":
                    passed += process_tree.output_pipes(self._command(request))
                    answer = {}
                case "relieve":
                    ended = site_cgroup.relieve(self._tenants.group(str(request["tenant"])))
                    answer = {} if ended is None else {"process": ended.name, "bytes": ended.bytes}
                case "reserve":
                    site_cgroup.reserve(self._tenants.group(str(request["tenant"])))
                    answer = {}
                case "break_off":
                    pid, address = self._tenants.network(str(request["tenant"]))
                    leave = frozenset(map(int, request["leave"]))
                    answer = {"ended": connections.break_off(pid, address, int(request["port"]), leave)}
                case "changed":
                    disk = self._tenants.disk(str(request["tenant"]), str(request["workspace"]))
                    answer = {"changed": changed_since(disk.path, str(request["since"]))}
                case "cut_off":
                    answer = {"ended": cut_off(str(request["member"]), self._tenants.members())}
                case "bind_ports":
                    for port in self._tenants.ports(str(request["tenant"])):
                        port.bind()
                    answer = {}
                case "quotas":
                    pool = self._tenants.pool()
                    answer = {
                        "changed": [] if pool is None else Quotas(pool).enforce(),
                        "read_ahead": "" if pool is None else bound_read_ahead(pool),
                    }
                    self._tenants.limit_disks()
                    self._tenants.release_folders()
                case "free_disks":
                    self._tenants.free_disks()
                    answer = {}
                case "limit_disk":
                    of = {key: request.get(key) is True for key in ("ending", "standby")}
                    answer = {"counted": self._tenants.limit_disk(str(request["instance"]), **of)}
                case _:
                    raise ValueError("unknown request")
        except GatewayError as error:
            answer = {"refused": error.code, "message": error.message, "facts": error.facts}
        except (OSError, ValueError, KeyError, TypeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            socket.send_fds(self._connection, [orjson.dumps(answer)], passed)
        finally:
            for descriptor in passed:
                os.close(descriptor)

    def _command(self, request: dict[str, Any]) -> Path:
        """Return the cgroup of the command that a request names."""
        container = self._tenants.group(str(request["tenant"]))
        return process_tree.of_command(container, str(request["group"]))

    @staticmethod
    def _open(disk: Disk) -> int:
        """Open the workspace without following links controlled by the tenant."""
        flags = os.O_DIRECTORY | os.O_CLOEXEC | (kernel.O_PATH or os.O_RDONLY)
        if disk.real and kernel.HAS_OPENAT2:
            top = kernel.openat2(kernel.AT_FDCWD, os.fsencode(disk.path), flags, kernel.RESOLVE_NO_SYMLINKS)
        else:
            top = os.open(disk.path, flags | os.O_NOFOLLOW)
        try:
            # The folder itself must not be a link either: the tenant controls its parents and may swap it.
            return kernel.open_real(top, disk.inside, flags)
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
        disk = self._tenants.disk(spawn.tenant, spawn.workspace)
        folder = self._open(disk)
        try:
            status = os.fstat(folder)
            plan = None
            # root's `local` runtime owns its tenants itself, so there is no other user to become
            if self._privileged and (disk.idmap or disk.uid):
                uid, gid = disk.outside(disk.uid, disk.gid)
                namespace = self._namespaces.get(disk.idmap) if disk.idmap and not disk.shifted else None
                file = spawn.limits.write_max
                plan = Plan(
                    *(folder, namespace, uid, gid, spawn.memory, file),
                    read_only=disk.read_only or spawn.looks,
                    covered=disk.covered,
                )
            ours, theirs = socket.socketpair()
            with theirs:
                worker = self._zygote.start(spawn, plan, ours, theirs, folder)
        finally:
            os.close(folder)
        inode = (status.st_dev, status.st_ino)
        self._children[worker.number] = _Child(worker.pid, disk, inode, worker.group)
        return worker.number, ours.detach()

    def _kill(self, number: int) -> None:
        child = self._children.get(number)
        if child is None:
            return
        os.kill(child.pid, signal.SIGKILL)  # the pid cannot have been reused: only _reap removes children
        until = time.monotonic() + _KILL_WAIT
        while number in self._children and time.monotonic() < until:
            self._reap()
            if number in self._children:
                select.select((), (), (), 0.001)

    def _reap(self) -> None:
        for number, child in list(self._children.items()):
            if os.waitpid(child.pid, os.WNOHANG)[0]:
                del self._children[number]
                child.group.remove()
        self._zygote.reap()


def main(arguments: list[str]) -> None:
    """Run the broker. Arguments: a socket's descriptor, the operations' module, JSON for `found_by`."""
    descriptor, operations, told = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway handles ^C and then closes the socket
    connection = socket.socket(fileno=int(descriptor))
    Broker(connection, operations, found_by(orjson.loads(told))).run()


GATEWAYS_MAX = 16  # connections: a gateway has four, or five in a cluster, its successor as many


def listening(arguments: list[str]) -> NoReturn:
    """Serve gateways on a unix socket until SIGTERM, but only processes of root and `uids`.

    The only argument is a JSON object: `path` of the socket, which gets the group `gid` and mode 0660, in a
    folder writable only by root; `operations`, `tenants`, `uids`. Connections above `GATEWAYS_MAX` are
    closed. Notifies systemd when ready. Raises `OSError`.
    """
    told = orjson.loads(arguments[0])
    path, operations, gid = str(told["path"]), str(told["operations"]), int(told["gid"])
    tenants = found_by(told["tenants"])
    served = {0, *told["uids"]}
    importlib.import_module(operations)
    preload()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # left by a killed broker
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
                # struct ucred: pid, uid, gid at the time of connect(2), as the kernel reports them
                ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                _, uid, _ = struct.unpack("iII", ucred)
                if uid not in served or len(children) >= GATEWAYS_MAX:
                    continue
                pid = os.fork()
                if pid == 0:
                    _serve_one(connection, listener, operations, tenants)
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
    tenants: TenantLocator,
) -> NoReturn:
    """Run the broker of one gateway in the forked child; never returns."""
    code = 1
    try:
        listener.close()
        connection.setblocking(True)
        end_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Broker(connection, operations, tenants).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
