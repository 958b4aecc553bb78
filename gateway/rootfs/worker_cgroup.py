"""The cgroup that limits a worker, created by the broker and removed with the worker.

`memory` limits what rlimits do not cover: the kernel's memory for the folders and names that a tenant makes
it read, and the page cache. `pids` additionally ensures that a worker is a single process. With cgroup v2,
which has all controllers in one hierarchy, the searches' cgroup also has a low CPU weight; elsewhere their
nice value does that.

The cgroups are at the top of each hierarchy, beside Incus's own, as `incus-gateway[-searches]/PID-START/N`.
They cannot be below the unit's cgroup, because in v2 a cgroup with processes cannot delegate controllers.
Paths consist of numbers and the kernel's mount table; a tenant controls nothing in them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from dataclasses import dataclass

from gateway.rootfs.kernel import started

_TOPS = {False: "incus-gateway", True: "incus-gateway-searches"}
_WANTED = ("memory", "pids")
_SEARCH_WEIGHT = 33  # of 100, the same ratio as between nice 5 and nice 0
_ATTEMPTS = 50  # attempts, a millisecond apart, to remove a cgroup that is becoming empty


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted hierarchy and the wanted controllers it has."""

    mount: str
    controllers: tuple[str, ...]
    unified: bool


def hierarchies(
    mountinfo: str = "/proc/self/mountinfo", wanted: tuple[str, ...] = _WANTED
) -> list[Hierarchy]:
    """Return the hierarchies of the wanted controllers: v1, v2 or both; empty if nothing is mounted."""
    found: dict[str, Hierarchy] = {}
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
            mounts = [line.split(" - ") for line in lines if " - cgroup" in line]
    except OSError:
        return []
    for left, right in mounts:
        mount = left.split(" ")[4]
        kind, _, options = right.strip().split(" ", 2)
        unified = kind == "cgroup2"
        offered = _read(f"{mount}/cgroup.controllers").split() if unified else options.split(",")
        for name in wanted:
            if name in offered and name not in found:
                found[name] = Hierarchy(mount, (name,), unified)
    merged: dict[str, Hierarchy] = {}
    for one in found.values():
        before = merged.get(one.mount)
        names = (*before.controllers, *one.controllers) if before else one.controllers
        merged[one.mount] = Hierarchy(one.mount, names, one.unified)
    return list(merged.values())


def controller_mount(name: str, mountinfo: str = "/proc/self/mountinfo") -> str | None:
    """Return the mount point of a controller's v1 hierarchy, None if v2 or nothing has it."""
    return next((one.mount for one in hierarchies(mountinfo, (name,)) if not one.unified), None)


@dataclass(frozen=True, slots=True)
class WorkerCgroup:
    """A worker's cgroup folders, each with its controllers. Empty if none could be created."""

    folders: tuple[tuple[str, Hierarchy], ...] = ()

    def enter(self) -> list[str]:
        """Move this process into the cgroups; return the controllers that can limit it now.

        The first move takes some ten milliseconds, because the kernel waits until no processor is forking.
        """
        entered: list[str] = []
        for folder, hierarchy in self.folders:
            if _write(f"{folder}/cgroup.procs", "0"):
                entered += hierarchy.controllers
        return entered

    def bound(self, memory: int) -> list[str]:
        """Limit to `memory` bytes and one process without threads; return the effective limits.

        Limits that cannot be set are omitted: the worker's other limits still hold.
        """
        bounded: list[str] = []
        for folder, hierarchy in self.folders:
            if "memory" in hierarchy.controllers:
                limit, swap = (
                    (("memory.max", memory), ("memory.swap.max", 0))
                    if hierarchy.unified
                    else (("memory.limit_in_bytes", memory), ("memory.memsw.limit_in_bytes", memory))
                )
                if _write(f"{folder}/{limit[0]}", str(limit[1])):
                    bounded.append("memory")
                    _write(f"{folder}/{swap[0]}", str(swap[1]))  # absent in a kernel that does not count swap
            if "pids" in hierarchy.controllers and _write(f"{folder}/pids.max", "1"):
                bounded.append("pids")
        return bounded

    def remove(self) -> None:
        """Remove the cgroups of an ended worker. Idempotent."""
        for folder, _ in self.folders:
            _remove(folder)


class WorkerCgroups:
    """The cgroups of one broker's workers. The constructor removes those left by killed brokers."""

    def __init__(self, found: list[Hierarchy]) -> None:
        self._parents: list[tuple[Hierarchy, dict[bool, str]]] = []
        pid = os.getpid()
        mine = f"{pid}-{started(pid)}"
        for hierarchy in found:
            parents: dict[bool, str] = {}
            for search, name in _TOPS.items():
                top = f"{hierarchy.mount}/{name}"
                _clear(top)
                if hierarchy.unified:
                    _delegate(hierarchy.mount, (*hierarchy.controllers, "cpu"))
                if not (_make(top) and _make(f"{top}/{mine}")):
                    break
                if hierarchy.unified:
                    for folder in (top, f"{top}/{mine}"):
                        _delegate(folder, hierarchy.controllers)
                    if search:
                        _write(f"{top}/cpu.weight", str(_SEARCH_WEIGHT))
                parents[search] = f"{top}/{mine}"
            else:
                self._parents.append((hierarchy, parents))

    def new(self, number: int, *, search: bool) -> WorkerCgroup:
        """Create the cgroup of worker `number`, without limits yet; omit what cannot be created."""
        folders = [
            (f"{parents[search]}/{number}", hierarchy)
            for hierarchy, parents in self._parents
            if _make(f"{parents[search]}/{number}")
        ]
        return WorkerCgroup(tuple(folders))

    def close(self) -> None:
        """Remove this broker's own folders once its workers are gone. The two top folders stay."""
        for _, parents in self._parents:
            for parent in parents.values():
                _remove(parent)
        self._parents.clear()


def _clear(top: str) -> None:
    """Remove the cgroups of dead brokers, killing any remaining workers."""
    for name in _names(top):
        pid, _, began = name.partition("-")
        folder = f"{top}/{name}"
        if not pid.isdigit() or not os.path.isdir(folder) or started(int(pid)) == began:
            continue
        for worker in [f"{folder}/{child}" for child in _names(folder) if child.isdigit()]:
            for left in _read(f"{worker}/cgroup.procs").split():
                with contextlib.suppress(OSError):
                    os.kill(int(left), signal.SIGKILL)
            _remove(worker)
        _remove(folder)


def _names(folder: str) -> list[str]:
    """Return the names in a folder, [] if another broker has removed it."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _delegate(folder: str, controllers: tuple[str, ...]) -> None:
    for name in controllers:
        # If refused, the controller's files are missing below.
        _write(f"{folder}/cgroup.subtree_control", f"+{name}")


def _make(folder: str) -> bool:
    try:
        os.mkdir(folder, 0o755)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def _remove(folder: str) -> None:
    for _ in range(_ATTEMPTS):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            return
        except OSError:
            select.select((), (), (), 0.001)  # its last process is still exiting
        else:
            return


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # never O_CREAT: the kernel makes it
    except OSError:
        return False
    try:
        os.write(descriptor, text.encode())
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
