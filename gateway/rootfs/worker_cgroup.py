"""The control groups that bound a worker: one for each, made by the broker, removed with the worker.

`memory` bounds what rlimits do not see: the kernel's own memory for the folders and names that a tenant
makes it look at, and the page cache. `pids` says once more that a worker is one process. Where one hierarchy
carries all controllers (cgroup v2) the searches' group has a small CPU weight too; elsewhere their nice value
does it.

The groups lie at the top of each hierarchy, beside Incus's own, as `incus-gateway[-searches]/PID-START/N`. A
unit's group would be of no use: in v2 one that holds processes can give no controller to groups below it.
Paths are made of numbers and of the kernel's mount table; nothing of a tenant's is in them.
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
_SEARCH_WEIGHT = 33  # of 100: as much less than others' as nice 5 is of nice 0
_ATTEMPTS = 50  # looks, a millisecond apart, at a group that is just becoming empty


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted hierarchy and those of the wanted controllers that it carries."""

    mount: str
    controllers: tuple[str, ...]
    unified: bool


def hierarchies(
    mountinfo: str = "/proc/self/mountinfo", wanted: tuple[str, ...] = _WANTED
) -> list[Hierarchy]:
    """Return where the wanted controllers are: v1, v2 or some in each. None if nothing is mounted."""
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
    """Return where a controller's v1 hierarchy is; None where v2 has it, or nothing."""
    return next((one.mount for one in hierarchies(mountinfo, (name,)) if not one.unified), None)


@dataclass(frozen=True, slots=True)
class WorkerCgroup:
    """One worker's folders, each with the controllers that may bound it there. Empty where none was made."""

    folders: tuple[tuple[str, Hierarchy], ...] = ()

    def enter(self) -> list[str]:
        """Move this process in; return the controllers that can bound it now.

        The kernel takes some ten milliseconds for the first folder: it waits until no processor forks.
        """
        entered: list[str] = []
        for folder, hierarchy in self.folders:
            if _write(f"{folder}/cgroup.procs", "0"):
                entered += hierarchy.controllers
        return entered

    def bound(self, memory: int) -> list[str]:
        """Allow at most `memory` bytes and one process without threads; return what is bounded.

        Leaves out what cannot be bounded: the worker's other limits hold without it.
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
        """Remove the folders of a worker that has ended. Idempotent."""
        for folder, _ in self.folders:
            _remove(folder)


class WorkerCgroups:
    """The groups of one broker's workers. Making it removes what killed brokers left."""

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
        """Make the group of worker `number`, which bounds nothing yet. What cannot be made is left out."""
        folders = [
            (f"{parents[search]}/{number}", hierarchy)
            for hierarchy, parents in self._parents
            if _make(f"{parents[search]}/{number}")
        ]
        return WorkerCgroup(tuple(folders))

    def close(self) -> None:
        """Remove this broker's own folders, once its workers are gone. The two top ones stay for the next."""
        for _, parents in self._parents:
            for parent in parents.values():
                _remove(parent)
        self._parents.clear()


def _clear(top: str) -> None:
    """Remove the groups of brokers that are gone; their workers died with them, or die here."""
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
    """Return what lies in a folder; of one that another broker removes meanwhile, nothing."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _delegate(folder: str, controllers: tuple[str, ...]) -> None:
    for name in controllers:
        # What is refused shows as a missing file below.
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
            select.select((), (), (), 0.001)  # its last process is still on its way out
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
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # never O_CREAT: a limit is there or it is not
    except OSError:
        return False
    try:
        os.write(descriptor, text.encode())
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
