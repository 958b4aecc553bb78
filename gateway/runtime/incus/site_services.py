"""The services of sites in Incus containers: as systemd tells, and cheaply as the host sees them.

Asking its systemd instead would take a command in the container, with a dozen processes.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from gateway.errors import GatewayError
from gateway.rootfs import file_calls, memory
from gateway.rootfs.kernel import started
from gateway.runtime.incus.provisioning import LOOK, Provisioning
from gateway.runtime.incus.service_unit import NAMES, script
from gateway.runtime.listening import ListeningSocket, listener, of_network
from gateway.runtime.sites import Life, Service, ServiceState, Side

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


SCRIPT: Final = script("unit_status")

_DIGITS: Final = 18
_STATES: Final[dict[str, ServiceState]] = {
    "active": "running",
    "reloading": "running",
    "activating": "starting",
}


def read(said: str) -> Service | None:
    """Return the unit's state, None if systemd did not report it."""
    facts, listens = dict[str, str](), set()
    for line in said.splitlines():
        name, _, value = line.partition("=")
        if name == "Listen":
            listens.add(listener(value))
        else:
            facts.setdefault(name, value)
    if "ActiveState" not in facts:
        return None
    # waiting for a restart
    waits = facts.get("SubState") in ("auto-restart", "auto-restart-queued")
    return Service(
        "ended" if waits else _STATES.get(facts["ActiveState"], "ended"),
        restarts=_number(facts.get("NRestarts")),
        started=_number(facts.get("ExecMainStartTimestampMonotonic")) / 1e6,
        oom_kills=_number(facts.get("OomKills")),
        listens=frozenset(one for one in listens if one is not None),
    )


def _number(said: str | None) -> int:
    return int(said) if said and said.isascii() and said.isdecimal() and len(said) <= _DIGITS else 0


class IncusServices:
    """Implements `gateway.runtime.sites.SiteServices`. `init_pid` is as in `Commands`."""

    def __init__(self, provisioning: Provisioning, init_pid: Callable[[str], Awaitable[int]]) -> None:
        self._provisioning, self._init_pid = provisioning, init_pid
        self._ends = Ends()

    def close(self) -> None:
        self._ends.close()

    async def state(self, tenant: str, side: Side) -> Service | None:
        try:
            said = await self._provisioning.script(tenant, SCRIPT, NAMES[side], seconds=LOOK)
            return read(said)
        except (GatewayError, TimeoutError):
            return None

    async def life(self, tenant: str, side: Side) -> Life | None:
        try:
            init_pid = await self._init_pid(tenant)
        except GatewayError:
            return None
        return await asyncio.to_thread(life, init_pid, NAMES[side]) if init_pid else None

    async def report_end(self, tenant: str, ended: Callable[[], None]) -> bool:
        try:
            init_pid = await self._init_pid(tenant)
        except GatewayError:
            return False
        return bool(init_pid) and self._ends.report(init_pid, NAMES["live"], ended)

    async def listening(self, tenant: str) -> Collection[ListeningSocket]:
        init_pid = await self._init_pid(tenant)
        try:
            folder = os.open(f"/proc/{init_pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return ()
        try:
            # asked again: an id that is still the container's was so when its folder was opened
            if not init_pid or await self._init_pid(tenant) != init_pid:
                return ()
            return await asyncio.to_thread(of_network, folder)
        finally:
            os.close(folder)

    async def log(self, tenant: str, side: Side) -> str:
        unit = f"--unit={NAMES[side]}"
        try:
            argv = ("journalctl", unit, "--lines=20", "--output=cat", "--no-pager")
            return await self._provisioning.run(tenant, argv, seconds=LOOK)
        except (GatewayError, TimeoutError):
            return ""
