"""Measure how short of memory a container is from its cgroups, and kill its site's biggest process.

A container that keeps reading its own pages back from the disk ("thrashes") is never out of memory for the
kernel, so no process is killed. It shows in the stall times of `memory.pressure` (PSI), which the v2 tree of
a hybrid host has too, and in the refaults of `memory.stat`; without PSI only the refaults show it.

Measuring needs no root; `relieve` does.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.rootfs import process_tree
from gateway.rootfs.kernel import read_part, started
from gateway.rootfs.worker_cgroup import controller_mount

SITE: Final = "system.slice/site.service"  # the cgroup of the site's unit

_TEXT: Final = 16 << 10  # most bytes of a kernel file
_LINES: Final = 256  # enough bytes for the stall times, or some pids
_LOOKED_AT: Final = 2000  # most processes to examine; a container may have a few hundred
_MEMORY: Final = re.compile(rb"^\d+:(?:[a-z_,]*,)?memory(?:,[a-z_,]*)?:(/.*)$", re.MULTILINE)
_TOTAL: Final = re.compile(rb"^some .*\btotal=(\d{1,20})$", re.MULTILINE)
_NAME: Final = re.compile(rb"^Name:\t(.{0,64})", re.MULTILINE)
# pids as seen by the host, by the container, and by any nested namespaces
_INNER: Final = re.compile(rb"^NSpid:\t\d+\t(\d{1,10})", re.MULTILINE)
_RESIDENT: Final = re.compile(rb"^VmRSS:\s*(\d{1,15}) kB", re.MULTILINE)
_STATUS: Final = 1 << 20  # bytes of a process's status, which lists its supplementary groups
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


@dataclass(frozen=True, slots=True)
class Process:
    """A process by its own name, and its resident memory in bytes."""

    name: str
    bytes: int


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


def biggest(of: Place) -> Process | None:
    """Return a container's process with the most memory, None if it has no processes."""
    found = _biggest(process_tree.pids(of.unified))
    return None if found is None else found[1]


def relieve(container: Path) -> Process | None:
    """Kill the biggest process of a container's site and return it, None if there is none. Needs root.

    Only processes in the cgroup of the site's unit are considered, so never a command, and never the
    container's init, wherever its root has moved it. A reused pid is safe: the process is held by a pidfd and
    then checked again.
    """
    group = container / SITE
    found = _biggest(process_tree.pids(group))
    if found is None:
        return None
    pid, process, began = found
    try:
        held = os.pidfd_open(pid)
    except OSError:
        return None  # it has already ended
    try:
        if started(pid) != began or pid not in process_tree.pids(group):
            return None
        signal.pidfd_send_signal(held, signal.SIGKILL)
    except ProcessLookupError:
        return None
    finally:
        os.close(held)
    return process


def _biggest(pids: list[int]) -> tuple[int, Process, str] | None:
    best: tuple[int, Process, str] | None = None
    for pid in pids[:_LOOKED_AT]:
        began = started(pid)
        try:
            status = read_part(f"/proc/{pid}/status", _STATUS)
        except OSError:
            continue  # it has already ended
        resident, name, inner = _RESIDENT.search(status), _NAME.search(status), _INNER.search(status)
        if resident is None or name is None or inner is None or int(inner[1]) == 1 or not began:
            continue
        size = int(resident[1]) << 10
        if best is None or size > best[1].bytes:
            best = pid, Process(name[1].decode("utf-8", "replace"), size), began
    return best


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
