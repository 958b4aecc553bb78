"""Keeps a part of a tenant's CPU for commands, where the tenant's own systemd cannot.

In v2 the site's unit and the commands are in groups of their own, whose weights the tenant's systemd sets
(`CPUWeight=`), and so they are on most hybrid hosts. Where v1's `cpu` is mounted by itself, without
`cpuacct`, a container's systemd has no use for it: all of a tenant is one group then, and a command waits for
its turn behind each thread of the site. There the site gets a group of its own, from outside.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path
from typing import Final

from gateway.bounds import part
from gateway.rootfs import trees
from gateway.rootfs.groups import controller_mount
from gateway.rootfs.memory import SITE

_NAME: Final = "site"
_SHARES: Final = 512  # half of what one process of a command has: so a site still answers beside a command
_TEXT: Final = 16 << 10
_CPU: Final = re.compile(rb"^\d+:(?:[a-z_,]*,)?cpu(?:,[a-z_,]*)?:(/.*)$", re.MULTILINE)


@functools.cache
def cpu_mount() -> str | None:
    """Return where v1's `cpu` is; None where there is nothing to do."""
    return controller_mount("cpu")


def lacking(container: Path) -> bool:
    """Return whether a site runs in the same group as all else of its container. Takes no root."""
    if cpu_mount() is None:
        return False
    with contextlib.suppress(OSError, ValueError):
        first = int(part(container / SITE / "cgroup.procs", 32).split(b"\n")[0])
        return _group(first) == f"/{container.name}"
    return False


def reserve(container: Path) -> None:
    """Give a container's site a group of its own in v1's `cpu`. Takes root."""
    mount = cpu_mount()
    if mount is None or not lacking(container):
        return
    group = Path(mount, container.name, _NAME)
    group.mkdir(exist_ok=True)
    (group / "cpu.shares").write_text(str(_SHARES))
    # what forks meanwhile is born where its parent is: once more
    for _ in range(2):
        for pid in trees.pids(container / SITE):
            with contextlib.suppress(OSError):  # it has ended
                if _group(pid) == f"/{container.name}":
                    (group / "cgroup.procs").write_text(str(pid))


def _group(pid: int) -> str:
    """Return the group of a process in v1's `cpu`; empty where it is gone."""
    try:
        found = _CPU.search(part(f"/proc/{pid}/cgroup", _TEXT))
    except OSError:
        return ""
    return "" if found is None else os.fsdecode(found[1])
