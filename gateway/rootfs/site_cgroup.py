"""The cgroup of a tenant's site: kill its biggest process, and reserve CPU for commands beside it.

With v2, and on most hybrid hosts, the site's unit and the commands have separate cgroups, whose weights the
tenant's systemd sets (`CPUWeight=`). If v1's `cpu` is mounted without `cpuacct`, a container's systemd does
not use it: then the whole tenant is one cgroup, and a command competes with each thread of the site. In that
case the site gets a separate cgroup from outside.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.rootfs import process_tree
from gateway.rootfs.kernel import read_part, started
from gateway.rootfs.worker_cgroup import controller_mount

SITE: Final = "system.slice/site.service"  # the cgroup of the site's unit

_LOOKED_AT: Final = 2000  # most processes to examine; a container may have a few hundred
_NAME: Final = re.compile(rb"^Name:\t(.{0,64})", re.MULTILINE)
# pids as seen by the host, by the container, and by any nested namespaces
_INNER: Final = re.compile(rb"^NSpid:\t\d+\t(\d{1,10})", re.MULTILINE)
_RESIDENT: Final = re.compile(rb"^VmRSS:\s*(\d{1,15}) kB", re.MULTILINE)
_STATUS: Final = 1 << 20  # bytes of a process's status, which lists its supplementary groups
_TEXT: Final = 16 << 10  # most bytes of a kernel file
_GROUP: Final = "site"  # in v1's `cpu`, below the container's
_SHARES: Final = 512  # half of a single process's share, so that a site still answers beside a command
_CPU: Final = re.compile(rb"^\d+:(?:[a-z_,]*,)?cpu(?:,[a-z_,]*)?:(/.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SiteProcess:
    """A process by its own name, and its resident memory in bytes."""

    name: str
    bytes: int


def biggest(cgroup: Path) -> SiteProcess | None:
    """Return the process of a cgroup with the most memory, None if it has no processes."""
    found = _biggest(cgroup)
    return None if found is None else found[1]


def relieve(container: Path) -> SiteProcess | None:
    """Kill the biggest process of a container's site and return it, None if there is none. Needs root.

    Only processes in the cgroup of the site's unit are considered, so never a command, and never the
    container's init, wherever its root has moved it. A reused pid is safe: the process is held by a pidfd and
    then checked again.
    """
    group = container / SITE
    found = _biggest(group)
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


def _biggest(cgroup: Path) -> tuple[int, SiteProcess, str] | None:
    best: tuple[int, SiteProcess, str] | None = None
    for pid in process_tree.pids(cgroup)[:_LOOKED_AT]:
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
            best = pid, SiteProcess(name[1].decode("utf-8", "replace"), size), began
    return best


@functools.cache
def cpu_mount() -> str | None:
    """Return the mount point of v1's `cpu`, None if there is nothing to do."""
    return controller_mount("cpu")


def lacks(container: Path, pid: int) -> bool:
    """Return whether a site's process is in the same cgroup as the rest of its container."""
    return _group(pid) == f"/{container.name}"


def reserve(container: Path) -> None:
    """Give a container's site a separate cgroup in v1's `cpu`. Needs root."""
    mount, pids = cpu_mount(), process_tree.pids(container / SITE)
    if mount is None or not pids or not lacks(container, pids[0]):
        return
    group = Path(mount, container.name, _GROUP)
    group.mkdir(exist_ok=True)
    (group / "cpu.shares").write_text(str(_SHARES))
    # twice, because children forked meanwhile start in their parent's old cgroup
    for _ in range(2):
        for pid in process_tree.pids(container / SITE):
            with contextlib.suppress(OSError):  # it has ended
                if _group(pid) == f"/{container.name}":
                    (group / "cgroup.procs").write_text(str(pid))


def _group(pid: int) -> str:
    """Return a process's cgroup in v1's `cpu`, empty if it is gone."""
    try:
        found = _CPU.search(read_part(f"/proc/{pid}/cgroup", _TEXT))
    except OSError:
        return ""
    return "" if found is None else os.fsdecode(found[1])
