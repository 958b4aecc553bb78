"""Tell one run of a service from the next, and when one ends, by its cgroup, which the host can read.

Asking its systemd instead would take a command in the container, with a dozen processes.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from typing import Final

from gateway.rootfs import file_calls, memory
from gateway.rootfs.kernel import started
from gateway.runtime.sites import Life

_BYTES: Final = 64  # enough for the first line of cgroup.procs
_READ: Final = 4096  # bytes of events: each has 16
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


class Ends:
    """Reports the ends of services as the kernel tells them: a service that runs costs nothing.

    `cgroup.events` of a unit changes when its last process ends (cgroups(7)), which inotify(7) reports. For
    one event loop.
    """

    def __init__(self) -> None:
        self._descriptor = -1
        self._reports: dict[int, Callable[[], None]] = {}  # by the kernel's number of a watch

    def close(self) -> None:
        """Report nothing more. Idempotent."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1
        self._reports.clear()

    def report(self, init_pid: int, unit: str, ended: Callable[[], None]) -> bool:
        """Call `ended` once, as soon as a unit in the container of `init_pid` has no process any more.

        Return False if it has none now, or the kernel cannot tell. A tenant's root may have it called while
        processes are left, by changing their cgroup in other ways.
        """
        place = memory.place(init_pid)
        if place is None:
            return False
        path = f"{place.below(f'system.slice/{unit}').unified}/cgroup.events"
        try:
            if self._descriptor < 0:
                self._descriptor = file_calls.inotify()
                asyncio.get_running_loop().add_reader(self._descriptor, self._read)
            number = file_calls.inotify_add(self._descriptor, file_calls.IN_MODIFY, os.fsencode(path))
        except OSError:
            return False
        if b"populated 1" not in memory.text(path, _BYTES):
            file_calls.inotify_remove(self._descriptor, number)
            return False
        self._reports[number] = ended
        return True

    def _read(self) -> None:
        try:
            told = os.read(self._descriptor, _READ)
        except BlockingIOError:
            return
        for number, mask, _, _ in file_calls.inotify_events(told):
            if mask & file_calls.IN_Q_OVERFLOW:
                for one in list(self._reports):
                    self._over(one)
            self._over(number)

    def _over(self, number: int) -> None:
        if (ended := self._reports.pop(number, None)) is not None:
            file_calls.inotify_remove(self._descriptor, number)
            ended()
