"""Tell one life of a service from the next by its control group, which the host can read.

To ask its systemd takes a command in the container, with a dozen processes.
"""

from __future__ import annotations

import os
import time
from typing import Final

from gateway.rootfs import memory
from gateway.rootfs.kernel import started
from gateway.runtime.sites import Life

_BYTES: Final = 64  # that hold the first line of a group's processes
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def life(init_pid: int, unit: str) -> Life | None:
    """Return the present life of a unit, by its container's first process; None where it has no processes."""
    place = memory.place(init_pid)
    if place is None:
        return None
    group = place.below(f"system.slice/{unit}")
    first = (
        memory.text(f"{group.unified}/cgroup.procs", _BYTES).partition(b"\n")[0].decode("ascii", "replace")
    )
    began = started(int(first)) if first.isdecimal() else ""
    counted = memory.sample(group) if began else None
    if counted is None:
        return None
    ago = time.clock_gettime(time.CLOCK_BOOTTIME) - int(began) / _TICKS
    return Life(f"{first} {began}", time.monotonic() - ago, counted.ended)
