"""The processes of one command: what of them runs, and how all are ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from gateway.errors import GatewayError
from gateway.rootfs.process_tree import Member
from gateway.runtime import Killed, Process

log = logging.getLogger(__name__)

_SOONER: Final = 0.1  # seconds by which a second kill must be less patient to make a difference
_TOLD: Final = 100  # processes of a tree that a runtime tells of, at most


class CommandTree:
    """A command's process and all that it started. `emptied` is called once a kill has left nothing of them.

    `late` says that the tree was ended when only what the command left behind was seen to run.
    """

    def __init__(self, process: Process, name: str, emptied: Callable[[], None]) -> None:
        self.late = False
        self._process = process
        self._name = name
        self._emptied = emptied
        self._killing: asyncio.Task[Killed] | None = None
        self._due = 0.0  # when it stops to be patient

    async def members(self) -> Sequence[Member] | None:
        """Return what runs, None if that cannot be known."""
        try:
            return await self._process.left()
        except GatewayError as error:
            log.info("what runs of %s is not known: %s", self._name, error.message)
            return None

    @property
    def killed(self) -> bool:
        """Whether a kill has left nothing."""
        killing = self._killing
        if killing is None or not killing.done() or killing.cancelled() or killing.exception() is not None:
            return False
        return killing.result().survivors == 0

    def begin_kill(self, grace: float, *, running: bool) -> bool:
        """Start to end all and return at once: whether that was not under way already.

        `running` says that the command's own end is not known yet. A second kill may have less patience.
        """
        due, killing = asyncio.get_running_loop().time() + grace, self._killing
        if killing is not None and not killing.done():
            if due < self._due - _SOONER:
                self._due = due
                self._begin(self._hasten(killing, grace))
            return False
        if self.killed and running:
            return False  # its end is just being told
        self._due = due
        self._begin(self._kill(grace, running))
        return True

    async def wait_killed(self) -> Killed:
        """Wait for the kill that was begun. Raises what it raises."""
        killing = None
        while killing is not self._killing:  # another's patience may have been shorter meanwhile
            killing = self._killing
            assert killing is not None
            killed = await asyncio.shield(killing)
        return killed

    async def settle(self) -> bool:
        """Wait until a kill that is under way is over, whatever comes of it; False if there was none."""
        if self._killing is None:
            return False
        await asyncio.wait([self._killing])
        return True

    def _begin(self, kill: Coroutine[Any, Any, Killed]) -> None:
        self._killing = asyncio.create_task(kill, name=f"kill {self._name}")
        self._killing.add_done_callback(self._over)

    def _over(self, killing: asyncio.Task[Killed]) -> None:
        # one without a caller (linger, timeout) may fail while Incus is away; the exec then ends `lost`
        with contextlib.suppress(asyncio.CancelledError, GatewayError, TimeoutError):
            if killing.result().survivors == 0:
                self._emptied()

    async def _kill(self, grace: float, running: bool) -> Killed:
        if running:
            self.late = await self._outlived()
        return await self._process.kill(grace)

    async def _hasten(self, first: asyncio.Task[Killed], grace: float) -> Killed:
        """Wait `grace` seconds for a kill that is under way, then KILL what is left."""
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
        """Whether the command was seen to have ended before its outputs, which what it left holds open."""
        members = await self.members() or ()
        return 0 < len(members) < _TOLD and all(member.pid != self._process.pid for member in members)
