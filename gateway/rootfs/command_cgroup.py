"""Ends a command's tree through its cgroup, from the host.

Each exec runs in a cgroup v2 of its own, made inside the container's delegated tree. Whatever its
processes do (`setsid`, double fork, a cleared environment, a fork bomb), they stay in it, and one write
to `cgroup.kill` ends all of them at once. A process that moves itself out, which takes the tenant's root, is
moved back as long as its environment, its parents or its session show its command (`process_tree.catch`).

Paths come from the kernel (`/proc/PID/cgroup`) and from names that the gateway made. A tenant cannot put
links into cgroupfs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Final, ParamSpec, TypeVar

from gateway.bounds import aside
from gateway.errors import Timeout
from gateway.rootfs import process_tree
from gateway.rootfs.process_tree import PARENT

P = ParamSpec("P")
T = TypeVar("T")

# seconds at most until a tree stands still; one in the middle of a slow call takes longer
_FREEZING: Final = 1.0
_STEP: Final = 10.0  # seconds of one look or step; it takes a moment, and no other tenant waits for it

# Does one of `process_tree.STEPS` on a path: here, or by the broker where this process may not.
Hands = Callable[[str, Path], Awaitable[None]]


async def here(step: str, path: Path) -> None:
    """Do a step with this process' own rights."""
    await _look(path, process_tree.STEPS[step], path)


async def of_init(pid: int) -> Path | None:
    """Return the root group of the container whose first process is `pid`; None if there is none."""
    return await aside(pid, _STEP, process_tree.of_init, pid)


async def lives(container: Path, own: str) -> list[str]:
    """Return the groups of one gateway's lives in a container, or those that its tenant calls so."""
    return await _look(container / PARENT / own, process_tree.lives, container, own)


async def commands(container: Path, life: str) -> list[str]:
    """Return the groups of the commands of one life, `LIFE/COMMAND`."""
    return await _look(container / PARENT / life, process_tree.commands, container, life)


async def _look(path: Path, work: Callable[P, T], *given: P.args, **more: P.kwargs) -> T:
    """Work on a command's group off the loop; all work on one container's waits behind each other."""
    container = next((up for up in path.parents if up.name == PARENT), path)
    try:
        return await aside(container, _STEP, work, *given, **more)
    except TimeoutError:
        raise Timeout(
            "the tenant's processes could not be searched in time; restart the tenant to end them"
        ) from None


@dataclass(frozen=True, slots=True)
class Ended:
    """`killed` processes were found and ended, `survivors` are still there after the limit."""

    killed: int
    escalated: bool
    survivors: int


class CommandCgroup:
    """One exec's cgroup, as seen from the host. `hands` does what takes root."""

    def __init__(self, path: Path, hands: Hands = here) -> None:
        self.path = path
        self._hands = hands

    async def reachable(self) -> bool:
        """Tell whether we may kill through it: its tree is there, and so is it, or it has ended."""
        return await _look(self.path, self._reachable)

    def _reachable(self) -> bool:
        if self.path.exists():
            return self._hands is not here or os.access(self.path / "cgroup.kill", os.W_OK)
        return self.path.parent.exists()

    async def pids(self) -> list[int]:
        """Return the processes in it and below it."""
        return await _look(self.path, process_tree.pids, self.path)

    async def members(self) -> list[process_tree.Member]:
        """Return the same as the tenant sees them, a hundred at most."""
        return await _look(self.path, process_tree.members, self.path)

    async def kill(self, grace: float, limit: float) -> Ended:
        """TERM to every process, `grace` seconds, then KILL; return when none is left or `limit` passed."""
        with contextlib.suppress(Timeout):  # what is in the group is ended all the same
            await self._hands("catch", self.path)
        first = await self.pids()
        seen = set(first)
        if grace > 0 and first:
            await self._terminate(seen)
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

    async def _terminate(self, seen: set[int]) -> None:
        """Send TERM to all; of several none can start another meanwhile, which would not get it."""
        if len(seen) == 1:  # mostly, and then it is not worth the milliseconds
            await self._hands("terminate", self.path)
            return
        await self._hands("freeze", self.path)
        try:
            deadline = monotonic() + _FREEZING
            while monotonic() < deadline:
                if await _look(self.path, process_tree.frozen, self.path):
                    break
                await asyncio.sleep(0.001)  # no event loop can wait on cgroup.events
            seen.update(await self.pids())
            await self._hands("terminate", self.path)
        finally:
            await self._hands("thaw", self.path)

    async def remove(self) -> bool:
        """Remove the cgroup once it is empty; tell whether it is gone."""
        if await _look(self.path, self.path.exists):
            await self._hands("remove", self.path)
        return not await _look(self.path, self.path.exists)

    async def _until_empty(self, seconds: float, seen: set[int]) -> None:
        # no event loop can wait on cgroup.events; the kernel takes 1-5 ms to empty a killed tree
        deadline, pause = monotonic() + seconds, 0.001
        while (left := await self.pids()) and monotonic() < deadline:
            seen.update(left)
            await asyncio.sleep(min(pause, max(0.0, deadline - monotonic())))
            pause = min(pause * 1.5, 0.02)


__all__ = ["CommandCgroup", "Ended", "Hands", "commands", "here", "lives", "of_init"]
