"""Tell one run of a service from the next by its cgroup, which the host can read.

Asking its systemd instead would take a command in the container, with a dozen processes.
"""

from __future__ import annotations

import os
import re
import time
from typing import Final

from gateway.rootfs import memory
from gateway.rootfs.kernel import started
from gateway.runtime.sites import Life

_BYTES: Final = 64  # enough for the first line of cgroup.procs
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_USED: Final = re.compile(rb"^usage_usec (\d{1,18})$", re.MULTILINE)  # of cpu.stat
_WAITED: Final = re.compile(rb"^some .*\btotal=(\d{1,18})$", re.MULTILINE)  # of cpu.pressure


def life(init_pid: int, unit: str) -> Life | None:
    """Return the current run of a unit in the container of `init_pid`, None if it has no processes."""
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
    # on a crowded host what is at work mostly waits for its turn
    used = _USED.search(memory.text(f"{group.unified}/cpu.stat"))
    waited = _WAITED.search(memory.text(f"{group.unified}/cpu.pressure"))
    worked = sum(int(found[1]) for found in (used, waited) if found) / 1e6
    return Life(f"{first} {began}", time.monotonic() - ago, counted.ended, worked)
