"""Kill a command's process tree through its cgroup, from the host.

Each exec runs in its own cgroup (v2) inside the container's delegated tree. Whatever its processes do
(`setsid`, double fork, a cleared environment, a fork bomb), they stay in it, and one write to `cgroup.kill`
kills all of them at once. A process that moves itself out, for which it needs the tenant's root, is moved
back as long as its environment, its parents or its session reveal its command (`process_tree.catch`).

Paths come from the kernel (`/proc/PID/cgroup`) and from names chosen by the gateway. A tenant cannot create
links in cgroupfs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final, ParamSpec, TypeVar

from gateway.bounds import run_in_thread
from gateway.errors import Timeout
from gateway.rootfs import process_tree
from gateway.rootfs.kernel import read_part
from gateway.rootfs.process_tree import PARENT

P = ParamSpec("P")
T = TypeVar("T")

# most seconds to wait for a tree to freeze; a process in a slow system call takes longer
_FREEZING: Final = 1.0
_STEP: Final = 10.0  # seconds per step; usually instant, and no other tenant waits for it

_LIVES = 32  # processes of one gateway; each of them ends what its predecessor left
_LISTED = 100  # processes reported by name
_NAME = re.compile(rb"^Name:\t(.{0,64})", re.MULTILINE)
_INNER = re.compile(rb"^NSpid:.*?(\d{1,10})$", re.MULTILINE)
_STATUS = 1 << 20  # bytes of a process's status, which may list 65 536 supplementary groups

# Runs one of `process_tree.STEPS` on a path: here, or through the broker if this process lacks the rights.
Hands = Callable[[str, Path], Awaitable[None]]


Pipes = Callable[[], Awaitable[list[int]]]


async def _opened(path: Path) -> list[int]:
    return process_tree.output_pipes(path)


async def here(step: str, path: Path) -> None:
    """Run a step with this process's own rights."""
    await _look(path, process_tree.STEPS[step], path)


async def of_init(pid: int) -> Path | None:
    """Return the root cgroup of the container with the init process `pid`, or None."""
    return await run_in_thread(pid, _STEP, process_tree.of_init, pid)


async def lives(container: Path, own: str) -> list[str]:
    """Return the cgroups in a container named like processes of one gateway; the tenant may imitate them."""
    names = await _inner(container / PARENT)
    return [name for name in names if name.startswith(f"{own}-")][:_LIVES]


async def commands(container: Path, life: str) -> list[str]:
    """Return the cgroups of the commands of one gateway process, `LIFE/COMMAND`."""
    return [f"{life}/{name}" for name in await _inner(container / PARENT / life)]


async def _inner(path: Path) -> list[str]:
    found = await _look(path, lambda: list(process_tree.children(path)))
    return [folder.name for folder in found if process_tree.PART.fullmatch(folder.name)]


async def _look(path: Path, work: Callable[P, T], *given: P.args, **more: P.kwargs) -> T:
    """Run blocking work on a command's cgroup outside of the loop, serialised per container."""
    container = next((up for up in path.parents if up.name == PARENT), path)
    try:
        return await run_in_thread(container, _STEP, work, *given, **more)
    except TimeoutError:
        raise Timeout(
            "searching the tenant's processes took too long; restart the tenant to end them"
        ) from None


@dataclass(frozen=True, slots=True)
class CgroupMember:
    """A process of a command's tree: its pid as the tenant sees it, and its own name."""

    pid: int
    name: str


@dataclass(frozen=True, slots=True)
class Ended:
    """`killed` processes were found and killed, `survivors` are still running after the limit."""

    killed: int
    escalated: bool
    survivors: int


class CommandCgroup:
    """An exec's cgroup, as seen from the host. `hands` and `pipes` do what needs root."""

    def __init__(self, path: Path, hands: Hands = here, pipes: Pipes | None = None) -> None:
        self.path = path
        self._hands = hands
        self._pipes = pipes or partial(_opened, path)

    async def pipes(self) -> list[int]:
        """Open the outputs of the command in it, see `process_tree.output_pipes`. Raises `GatewayError`."""
        return await self._pipes()

    async def reachable(self) -> bool:
        """Return whether it can be used to kill: it is writable, or it is gone but its parent exists."""
        return await _look(self.path, self._reachable)

    def _reachable(self) -> bool:
        if self.path.exists():
            return self._hands is not here or os.access(self.path / "cgroup.kill", os.W_OK)
        return self.path.parent.exists()

    async def pids(self) -> list[int]:
        """Return the processes in the cgroup and below it."""
        return await _look(self.path, process_tree.pids, self.path)

    async def members(self) -> list[CgroupMember]:
        """Return up to a hundred of these processes, as the tenant sees them."""
        return await _look(self.path, _members, self.path)

    async def kill(self, grace: float, limit: float) -> Ended:
        """Send TERM, after `grace` seconds KILL; return once no process is left or `limit` seconds passed."""
        with contextlib.suppress(Timeout):  # the processes in the cgroup are killed anyway
            await self._hands("catch", self.path)
        first = await self.pids()
        seen = set(first)
        if grace > 0 and first:
            seen |= await self.send(signal.SIGTERM)
            await self._until_empty(grace, seen)
        left = await self.pids()
        escalated = bool(left)
        if left:
            seen.update(left)
            await self._hands("end", self.path)
            await self._until_empty(limit, seen)
            left = await self.pids()
        await self.remove()
        return Ended(killed=len(seen) - len(left), escalated=escalated, survivors=len(left))

    async def send(self, number: int) -> set[int]:
        """Send a signal to all processes, and return them.

        Several are frozen first: no new one can miss it, and none sees another end before its own comes.
        """
        step, seen = f"signal {int(number)}", set(await self.pids())
        if len(seen) == 1:  # the usual case, which is not worth the milliseconds of freezing
            await self._hands(step, self.path)
            return seen
        await self._hands("freeze", self.path)
        try:
            deadline = monotonic() + _FREEZING
            while monotonic() < deadline:
                if await _look(self.path, _frozen, self.path):
                    break
                await asyncio.sleep(0.001)  # an event loop cannot wait on cgroup.events
            seen.update(await self.pids())
            await self._hands(step, self.path)
        finally:
            await self._hands("thaw", self.path)
        return seen

    async def remove(self) -> bool:
        """Remove the cgroup if it is empty; return whether it is gone."""
        if await _look(self.path, self.path.exists):
            await self._hands("remove", self.path)
        return not await _look(self.path, self.path.exists)

    async def _until_empty(self, seconds: float, seen: set[int]) -> None:
        # an event loop cannot wait on cgroup.events; the kernel takes 1-5 ms to empty a killed tree
        deadline, pause = monotonic() + seconds, 0.001
        while (left := await self.pids()) and monotonic() < deadline:
            seen.update(left)
            await asyncio.sleep(min(pause, max(0.0, deadline - monotonic())))
            pause = min(pause * 1.5, 0.02)


def _members(path: Path) -> list[CgroupMember]:
    """Return up to a hundred processes in a cgroup and below it. Needs no root."""
    found: list[CgroupMember] = []
    for pid in process_tree.pids(path)[:_LISTED]:
        try:
            status = read_part(f"/proc/{pid}/status", _STATUS)
        except OSError:
            continue  # it has ended
        inner, name = _INNER.search(status), _NAME.search(status)
        found.append(
            CgroupMember(
                0 if inner is None else int(inner[1]),
                "" if name is None else name[1].decode("utf-8", "replace"),
            )
        )
    return found


def _frozen(path: Path) -> bool:
    """Return whether all processes are frozen, or freezing is not supported. Needs no root."""
    try:
        return "frozen 0" not in (path / "cgroup.events").read_text()
    except OSError:
        return True
