"""Find a container's init process through its LXC monitor, the host process that supervises it.

Incus reports the pid only in an instance's `state`, for which it starts two processes and walks the quotas of
all disks. The files read here are small and belong to the host; a tenant controls none of them.
"""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from typing import Final

from gateway.bounds import part

# hybrid cgroup hosts first, then pure v2 ones
_TREES: Final = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
_BYTES: Final = 1024
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SLACK: Final = 0.1  # seconds by which the kernel's start time may precede incusd's


def first_process(directory: Path, container: str, since: str) -> int:
    """Return the host pid of a container's init process, 0 if it cannot be determined safely.

    `directory` is this incusd's directory: another daemon on the host may have a container of the same name.
    `container` includes the project's prefix, as in host paths. `since` is the start time reported by Incus,
    because a previous run of the container may still be shutting down.
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
            return 0  # it is just starting or ending, or is not ours
    return 0


def _began(pid: int) -> float:
    """Return a process's start time in seconds since the epoch."""
    after_name = part(f"/proc/{pid}/stat", _BYTES).rpartition(b")")[2].split()
    ago = time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / _TICKS
    return time.time() - ago
