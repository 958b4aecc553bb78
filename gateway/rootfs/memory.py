"""Measure how short of memory a container is from its cgroups, by its stalls and refaults.

A container that keeps reading its own pages back from the disk ("thrashes") is never out of memory for the
kernel, so no process is killed. It shows in the stall times of `memory.pressure` (PSI), which the v2 tree of
a hybrid host has too, and in the refaults of `memory.stat`; without PSI only the refaults show it.

Also read the limits in force, which may differ from those that are configured: Incus applies a limit when its
configuration changes, and not always as configured. A PATCH of a running instance's `limits.memory` to ""
leaves it without one until its next start (measured with Incus 6.0.4). So they are read from the control
groups and the pool's quota, of version 1, 2 or both. Nothing here needs root, except for a disk's limit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.rootfs import process_tree
from gateway.rootfs.kernel import read_part
from gateway.rootfs.process_tree import mount_point
from gateway.rootfs.quotas import Quotas
from gateway.rootfs.site_cgroup import SITE, cpu_mount
from gateway.rootfs.worker_cgroup import controller_mount

_TEXT: Final = 16 << 10  # most bytes of a kernel file
_LINES: Final = 256  # enough bytes for the stall times, or some pids
_MEMORY: Final = re.compile(rb"^\d+:(?:[a-z_,]*,)?memory(?:,[a-z_,]*)?:(/.*)$", re.MULTILINE)
_TOTAL: Final = re.compile(rb"^some .*\btotal=(\d{1,20})$", re.MULTILINE)
UNLIMITED: Final = 1 << 60  # bytes; a limit from here on means no limit


@dataclass(frozen=True, slots=True)
class Place:
    """A container's cgroups: in the v2 tree, and in v1's memory hierarchy, if any."""

    unified: Path
    memory: Path | None

    def below(self, group: str) -> Place:
        return Place(self.unified / group, None if self.memory is None else self.memory / group)


@dataclass(frozen=True, slots=True)
class Sample:
    """A cgroup's counters at one moment. `stalled` is in seconds, None if the kernel does not measure it.

    `refaults` counts dropped pages that were read back. `usage` and `limit` are in bytes; `limit` is None if
    there is none. `ended` counts processes killed by the kernel.
    """

    at: float
    stalled: float | None
    refaults: int
    usage: int = 0
    limit: int | None = None
    ended: int = 0


def place(init: int) -> Place | None:
    """Return the cgroups of a container by its init pid, None if there are none."""
    unified = process_tree.of_init(init)
    if unified is None or not unified.is_dir():
        return None
    mount = _memory_mount()
    found = None if mount is None else _MEMORY.search(text(f"/proc/{init}/cgroup"))
    if mount is None or found is None:
        return Place(unified, None)
    return Place(unified, Path(mount, os.fsdecode(found[1]).removesuffix("/init.scope").lstrip("/")))


@functools.cache
def _memory_mount() -> str | None:
    return controller_mount("memory")


def text(path: str, limit: int = _TEXT) -> bytes:
    """Return the first bytes of a kernel file, b"" if its cgroup or process is gone."""
    try:
        return read_part(path, limit)
    except OSError:
        return b""


class KernelFile:
    """A small kernel file that is read repeatedly through a descriptor kept open.

    Opening costs several times as much as reading. If the cgroup was recreated, such as that of a restarted
    unit, the file is reopened. The descriptor is closed with the object.
    """

    __slots__ = ("_descriptor", "_path")

    def __init__(self, path: str) -> None:
        self._path, self._descriptor = path, -1

    def __del__(self) -> None:
        self._close()

    def read(self) -> bytes:
        """Return its first line or two, b"" if its cgroup is gone."""
        if self._descriptor >= 0:
            try:
                return os.pread(self._descriptor, _LINES, 0)
            except OSError:  # ENODEV: the cgroup no longer exists
                self._close()
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._descriptor, _LINES, 0)
        except OSError:
            return b""

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def site_processes(of: Place) -> KernelFile:
    """Return the file with the processes of a container's site; see `first_process`."""
    return KernelFile(f"{of.unified}/{SITE}/cgroup.procs")


def first_process(site: KernelFile) -> int:
    """Return the first process of a container's site; 0 if it has none, or its CPU needs no reserve."""
    if cpu_mount() is None:
        return 0
    number = site.read().partition(b"\n")[0]
    return int(number) if number.isdigit() else 0


def stalls(of: Place) -> KernelFile:
    """Return the file with the time that processes of a cgroup waited for memory; see `waited`."""
    return KernelFile(f"{of.unified}/memory.pressure")


def waited(said: bytes) -> float | None:
    """Parse the seconds in which some process waited for memory, None if not measured."""
    found = _TOTAL.search(said)
    return None if found is None else int(found[1]) / 1e6


def stalled(of: Place) -> float | None:
    """Return the seconds in which some process of a cgroup waited for memory, None if not measured."""
    return waited(text(f"{of.unified}/memory.pressure"))


def sample(of: Place) -> Sample | None:
    """Return a cgroup's counters, None if it is gone or has no counters of its own."""
    now = time.monotonic()
    if of.memory is None:
        facts = _facts(text(f"{of.unified}/memory.stat"))
        refaults, known = _sum(facts, "workingset_refault"), bool(facts)
        usage, limit = _number(f"{of.unified}/memory.current"), _number(f"{of.unified}/memory.max")
        ended = _facts(text(f"{of.unified}/memory.events")).get("oom_kill", 0)
    else:
        facts = _facts(text(f"{of.memory}/memory.stat"))
        refaults, known = _sum(facts, "total_workingset_refault"), bool(facts)
        usage, limit = _number(f"{of.memory}/memory.usage_in_bytes"), facts.get("hierarchical_memory_limit")
        ended = _facts(text(f"{of.memory}/memory.oom_control")).get("oom_kill", 0)
    waited = stalled(of)
    if not known and waited is None:
        return None
    return Sample(
        now, waited, refaults, usage or 0, None if limit is None or limit >= UNLIMITED else limit, ended
    )


def private(of: Place) -> int | None:
    """Return the bytes of a cgroup that the kernel cannot reclaim, None if it is gone or has no counters.

    Of the kernel's own memory for it, v2 tells what can be reclaimed: folders and names that were looked at,
    some hundred MiB after an `npm install`. With v1 all of that memory counts.
    """
    if of.memory is None:
        facts = _facts(text(f"{of.unified}/memory.stat"))
        if "anon" not in facts:
            return None
        kernel = max(0, facts.get("kernel", 0) - facts.get("slab_reclaimable", 0))
        return facts["anon"] + facts.get("shmem", 0) + kernel
    facts = _facts(text(f"{of.memory}/memory.stat"))
    kernel_v1 = _number(f"{of.memory}/memory.kmem.usage_in_bytes")
    if "total_rss" not in facts or kernel_v1 is None:
        return None
    return facts["total_rss"] + facts.get("total_shmem", 0) + kernel_v1


def _facts(said: bytes) -> dict[str, int]:
    """Parse lines of a name and a number; other lines are ignored."""
    facts = {}
    for line in said.splitlines():
        name, _, number = line.partition(b" ")
        if number.isdigit() and len(number) <= 20:
            facts[name.decode("ascii", "replace")] = int(number)
    return facts


def _sum(facts: dict[str, int], name: str) -> int:
    """Return a counter that newer kernels (5.9) split into files and anonymous memory."""
    return facts.get(name, 0) + facts.get(f"{name}_file", 0) + facts.get(f"{name}_anon", 0)


def _number(path: str) -> int | None:
    said = text(path).strip()
    return int(said) if said.isdigit() and len(said) <= 20 else None


# each limit's controller, and its file in version 1 and in version 2
_FILES: Final = {
    "memory": ("memory", "memory.limit_in_bytes", "memory.max"),
    "swap": ("memory", "memory.memsw.limit_in_bytes", "memory.swap.max"),  # version 1 counts memory, too
    "processes": ("pids", "pids.max", "pids.max"),
    "cpu": ("cpuset", "cpuset.cpus", "cpuset.cpus.effective"),
}


def limits_in_force(init: int, pool: Path, folder: str, identity: str) -> Mapping[str, int | None]:
    """Return the limits of the container with the init process `init`; None for one that does not exist.

    `memory`, `swap` and `disk` are in bytes, `processes` and `cpu` are numbers. What this kernel or pool
    cannot limit is missing, and so is the disk where this process may not see it: that takes root. `folder`
    is the instance's in the pool mounted at `pool`, `identity` its id.
    """
    said = text(f"/proc/{init}/cgroup")
    found: dict[str, int | None] = {}
    for name, (controller, first, second) in _FILES.items():
        mount = _mount(controller)
        if (group := _group(said, "" if mount is None else controller)) is None:
            continue
        file = f"{mount or mount_point()}{group}/{second if mount is None else first}"
        if value := text(file).decode().strip():
            found[name] = _cpus(value) if name == "cpu" else _limit(value)
            if name == "swap" and mount is not None and (memory := found.get("memory")) is not None:
                found[name] = None if found[name] is None else (found[name] or 0) - memory
    # no quotas, not root's process, or just being removed
    with contextlib.suppress(LookupError, OSError, ValueError):
        found["disk"] = Quotas(pool).limit_of(folder, identity)
    return found


@functools.cache
def _mount(controller: str) -> str | None:
    return controller_mount(controller)


def _group(said: bytes, controller: str) -> str | None:
    """Return a container's cgroup in the hierarchy of a controller of version 1, or of version 2 with ""."""
    for line in said.splitlines():
        names, _, path = line.partition(b":")[2].partition(b":")
        if controller.encode() in names.split(b","):
            return os.fsdecode(path).removesuffix("/init.scope")
    return None


def _limit(value: str) -> int | None:
    return int(value) if value.isdecimal() and len(value) < 20 and int(value) < UNLIMITED else None


def _cpus(value: str) -> int:
    """Return how many CPUs a list such as 0-2,5 names."""
    spans = (one.partition("-")[::2] for one in value.split(","))
    return sum(int(last or first) - int(first) + 1 for first, last in spans)
