"""Knows how to end a command's tree through its cgroup, from the host.

Each exec runs in a cgroup v2 of its own, made inside the container's delegated tree. Whatever its
processes do (`setsid`, double fork, a cleared environment, a fork bomb), they stay in it, and one write
to `cgroup.kill` ends all of them at once. Only who moves itself out, which takes the tenant's root,
escapes; the answer counts what is left and never claims more.

Paths come from the kernel (`/proc/PID/cgroup`) and from names that the gateway made. A tenant cannot put
links into cgroupfs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

_FOLDERS = 1000  # a tenant may make more below its exec; they die with it, but are not counted


@dataclass(frozen=True, slots=True)
class Ended:
    """`killed` processes were found and ended, `survivors` are still there after the limit."""

    killed: int
    escalated: bool
    survivors: int


def mount_point() -> Path | None:
    """Return where the v2 tree is mounted: the top on pure hosts, `unified` on hybrid ones."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                return Path(left.split(" ")[4])
    return None


def of_init(pid: int) -> Path | None:
    """Return the root cgroup of the container whose first process is `pid`; None where there is none."""
    mount = mount_point()
    if mount is None:
        return None
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
            path = next((line[3:].strip() for line in lines if line.startswith("0::")), None)
    except OSError:
        return None
    if path is None:
        return None
    return mount / path.removesuffix("/init.scope").lstrip("/")


class Cgroup:
    """One exec's cgroup, as seen from the host."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def reachable(self) -> bool:
        """Tell whether we may kill through it: its tree is there, and so is it, or it has ended."""
        if self.path.exists():
            return os.access(self.path / "cgroup.kill", os.W_OK)
        return self.path.parent.exists()

    def pids(self) -> list[int]:
        """Return the processes in it and below it: a tenant's root can make folders of its own there."""
        found: list[int] = []
        for folder in self._folders():
            # gone, or removed between open and read (ENODEV)
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
        return found

    def _folders(self) -> list[Path]:
        below = itertools.islice(os.walk(self.path), _FOLDERS)
        return [Path(folder) for folder, _, _ in below]

    async def kill(self, grace: float, limit: float) -> Ended:
        """TERM to every process, `grace` seconds, then KILL; return when none is left or `limit` passed."""
        first = self.pids()
        seen = set(first)
        if grace > 0:
            for pid in first:
                self._signal(pid, signal.SIGTERM)
            await self._until_empty(grace, seen)
        left = self.pids()
        escalated = bool(left)
        if left:
            seen.update(left)
            with contextlib.suppress(OSError):
                (self.path / "cgroup.kill").write_text("1")
            await self._until_empty(limit, seen)
            left = self.pids()
        self.remove()
        return Ended(killed=len(seen) - len(left), escalated=escalated, survivors=len(left))

    def remove(self) -> bool:
        """Remove the cgroup once it is empty; tell whether it is gone."""
        for folder in reversed(self._folders()):
            with contextlib.suppress(OSError):  # a process is left, or is just dying
                folder.rmdir()
        return not self.path.exists()

    async def _until_empty(self, seconds: float, seen: set[int]) -> None:
        # no event loop can wait on cgroup.events; the kernel takes 1-5 ms to empty a killed tree
        deadline, pause = monotonic() + seconds, 0.001
        while (left := self.pids()) and monotonic() < deadline:
            seen.update(left)
            await asyncio.sleep(min(pause, max(0.0, deadline - monotonic())))
            pause = min(pause * 1.5, 0.02)

    def _signal(self, pid: int, number: signal.Signals) -> None:
        # a pid may have been reused since it was read: hold the process first, then look again
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return
        try:
            if pid in self.pids():
                signal.pidfd_send_signal(descriptor, number)
        except OSError:
            pass
        finally:
            os.close(descriptor)
