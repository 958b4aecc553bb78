"""Find the host's own daemons in the process table, which also shows the processes of tenants.

A tenant chooses the names, arguments and variables of its processes, so these alone prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")


def find(is_ours: Callable[[int], bool]) -> int | None:
    """Return the pid of a process outside of containers that `is_ours` accepts, or None."""
    pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    return next((pid for pid in pids if is_ours(pid)), None)


def outside_containers(pid: int) -> bool:
    """Return whether a process runs in our own PID namespace; False if it has ended.

    Unlike the links in /proc/PID/ns, everyone may read this of any process.
    """
    try:
        return _depth(str(pid)) == _depth("self")
    except OSError:
        return False


def _depth(process: str) -> int:
    """Return in how many nested PID namespaces a process has a number (proc_pid_status(5))."""
    lines = (PROC / process / "status").read_text(errors="replace").splitlines()
    # a kernel without PID namespaces says nothing of them, and has no containers
    return next((len(line.split()) for line in lines if line.startswith("NSpid:")), 0)
