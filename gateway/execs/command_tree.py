"""The process tree of one command: list what runs, kill all of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from gateway.errors import GatewayError
from gateway.rootfs.command_cgroup import Member
from gateway.runtime import Killed, Process

log = logging.getLogger(__name__)

_SOONER: Final = 0.1  # seconds by which a second kill must be earlier to replace the first
_TOLD: Final = 100  # most processes of a tree that a runtime reports


class CommandTree:
    """A command's process and its descendants. `emptied` is called once a kill has left none of them.

    `late` is set if the kill came after the command itself had ended and only its descendants were running.
    `lasting` is set if the command has ended and descendants were still running when last seen.
    """

    def __init__(self, process: Process, name: str, emptied: Callable[[], None]) -> None:
        self.late = False
        self.lasting = False
        self._process = process
        self._name = name
        self._emptied = emptied
        self._killing: asyncio.Task[Killed] | None = None
        self._due = 0.0  # when the grace period ends, in loop time

    async def members(self) -> Sequence[Member] | None:
        """Return the running processes, or None if they cannot be determined."""
        try:
            return await self._process.left()
        except GatewayError as error:
            log.info("cannot list the processes of %s: %s", self._name, error.message)
            return None

    async def left(self, grace: float | None) -> int | None:
        """Return how many processes an ended command has left, None if that is unknown.

        Waits for a kill under way. Otherwise, with a `grace`, those processes are killed.
        """
        killed = await self._settle()
        if not killed and grace is not None and await self.members():
            with contextlib.suppress(GatewayError, TimeoutError):
                await self._process.kill(grace)
        left = await self.members()
        self.lasting = bool(left)
        return None if left is None else len(left)

    async def look(self) -> Sequence[Member]:
        """Return the processes that an ended command left and that still run, as far as that is known."""
        left = await self.members() if self.lasting else ()
        if left is not None:
            self.lasting = bool(left)
        return left or ()

    @property
    def killed(self) -> bool:
        """Whether a kill has finished and left no process."""
        killing = self._killing
        if killing is None or not killing.done() or killing.cancelled() or killing.exception() is not None:
            return False
        return killing.result().survivors == 0

    def begin_kill(self, grace: float, *, running: bool) -> bool:
        """Start killing the tree without waiting; return False if a kill was already under way.

        `running` is True while the command's own end is unknown. A second kill may shorten the grace period.
        """
        due, killing = asyncio.get_running_loop().time() + grace, self._killing
        if killing is not None and not killing.done():
            if due < self._due - _SOONER:
                self._due = due
                self._begin(self._hasten(killing, grace))
            return False
        if self.killed and running:
            return False  # its end is being reported right now
        self._due = due
        self._begin(self._kill(grace, running))
        return True

    async def wait_killed(self) -> Killed:
        """Wait for the kill under way and return its result. Raises what the kill raises."""
        killing = None
        while killing is not self._killing:  # a less patient kill may have replaced it meanwhile
            killing = self._killing
            assert killing is not None
            killed = await asyncio.shield(killing)
        return killed

    async def _settle(self) -> bool:
        """Wait for a kill under way to finish, even if it fails; return False if there is none."""
        if self._killing is None:
            return False
        await asyncio.wait([self._killing])
        return True

    def _begin(self, kill: Coroutine[Any, Any, Killed]) -> None:
        self._killing = asyncio.create_task(kill, name=f"kill {self._name}")
        self._killing.add_done_callback(self._over)

    def _over(self, killing: asyncio.Task[Killed]) -> None:
        # a kill nobody waits for (linger, timeout) may fail while Incus is away; the exec then ends as `lost`
        with contextlib.suppress(asyncio.CancelledError, GatewayError, TimeoutError):
            if killing.result().survivors == 0:
                self._emptied()

    async def _kill(self, grace: float, running: bool) -> Killed:
        if running:
            self.late = await self._outlived()
        return await self._process.kill(grace)

    async def _hasten(self, first: asyncio.Task[Killed], grace: float) -> Killed:
        """Give a kill under way `grace` seconds, then send KILL to what is left."""
        await asyncio.wait([first], timeout=grace)
        if first.done():
            return first.result()
        harder = await self._process.kill(0)
        killed = await first
        return replace(
            killed,
            killed=max(killed.killed, harder.killed),
            escalated=killed.escalated or harder.escalated,
        )

    async def _outlived(self) -> bool:
        """Return whether the command has ended while its descendants still hold its outputs open."""
        members = await self.members() or ()
        return 0 < len(members) < _TOLD and all(member.pid != self._process.pid for member in members)
