"""Reserve part of a tenant's CPU for commands if the tenant's own systemd cannot.

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
from pathlib import Path
from typing import Final

from gateway.rootfs import memory, process_tree
from gateway.rootfs.memory import SITE, KernelFile
from gateway.rootfs.worker_cgroup import controller_mount

_NAME: Final = "site"
_SHARES: Final = 512  # half of a single process's share, so that a site still answers beside a command
_CPU: Final = re.compile(rb"^\d+:(?:[a-z_,]*,)?cpu(?:,[a-z_,]*)?:(/.*)$", re.MULTILINE)


@functools.cache
def cpu_mount() -> str | None:
    """Return the mount point of v1's `cpu`, None if there is nothing to do."""
    return controller_mount("cpu")


def processes(container: Path) -> KernelFile:
    """Return the file with the processes of a container's site; see `first`."""
    return KernelFile(f"{container}/{SITE}/cgroup.procs")


def first(site: KernelFile) -> int:
    """Return the first process of a container's site, 0 if it has none or there is nothing to do."""
    if cpu_mount() is None:
        return 0
    number = site.read().partition(b"\n")[0]
    return int(number) if number.isdigit() else 0


def lacks(container: Path, pid: int) -> bool:
    """Return whether a site's process is in the same cgroup as the rest of its container."""
    return _group(pid) == f"/{container.name}"


def reserve(container: Path) -> None:
    """Give a container's site a separate cgroup in v1's `cpu`. Needs root."""
    mount = cpu_mount()
    if mount is None or not lacks(container, first(processes(container))):
        return
    group = Path(mount, container.name, _NAME)
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
    found = _CPU.search(memory.text(f"/proc/{pid}/cgroup"))
    return "" if found is None else os.fsdecode(found[1])
