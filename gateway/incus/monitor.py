"""Finds a container's first process by LXC's monitor, the process of the host that watches it.

Incus tells it too, but only in an instance's `state`, for which it starts two processes and looks through the
quotas of all disks. What is looked at here is the host's, and of a few bytes; nothing of it is a tenant's.
"""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from typing import Final

from gateway.bounds import part

# on hosts with v1 controllers beside, and on pure ones
_TREES: Final = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
_BYTES: Final = 1024
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SLACK: Final = 0.1  # seconds by which the kernel's time of a start may be before that of incusd


def first_process(directory: Path, container: str, since: str) -> int:
    """Return the host's pid of a container's first process, 0 if it cannot be told for sure.

    `directory` is incusd's own, since others on this host may have a container of that name. `container` is
    with its project's name, as in the host's paths. `since` is when it was started, as Incus has it: an
    earlier life of it may be just ending.
    """
    title = f"[lxc monitor] {directory}/containers {container}".encode()
    for tree in _TREES:
        try:
            (monitor,) = part(f"{tree}/lxc.monitor.{container}/cgroup.procs", _BYTES).split()
            pid = int(monitor)
            if part(f"/proc/{pid}/cmdline", _BYTES).rstrip(b"\0 ") != title:
                return 0
            (child,) = part(f"/proc/{pid}/task/{pid}/children", _BYTES).split()
            return (
                int(child) if _began(int(child)) >= datetime.fromisoformat(since).timestamp() - _SLACK else 0
            )
        except FileNotFoundError:
            continue
        except (OSError, ValueError, IndexError):
            return 0  # it has just begun or ended, or is none of ours
    return 0


def _began(pid: int) -> float:
    """Return when a process began, in seconds since the epoch."""
    after_name = part(f"/proc/{pid}/stat", _BYTES).rpartition(b")")[2].split()
    ago = time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / _TICKS
    return time.time() - ago
