"""Run a helper command in a container that kills or unblocks another one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from gateway.bounds import Flood, first
from gateway.errors import Timeout
from gateway.incus import Incus, Lost
from gateway.runtime import KillResult
from gateway.runtime.incus.errors import in_time, translated
from gateway.runtime.launcher import DRAIN_SCRIPT, KILL_SCRIPT, KILLED_MAX, killed
from gateway.settings import Settings

_KILL_STARTS: Final = 5.0  # seconds for the kill script to start


class ContainerScripts:
    """Actions on a gateway's commands that run inside their containers."""

    def __init__(self, settings: Settings, incus: Incus) -> None:
        self._incus, self._limit = incus, settings.cancel_timeout

    async def kill(self, name: str, exec_id: str, grace: float) -> KillResult:
        """Kill a process tree from inside the container, if the host's cgroups are not accessible."""
        limit = self._limit
        milliseconds = [str(int(seconds * 1000)) for seconds in (grace, limit)]
        command = ["/bin/sh", "-c", KILL_SCRIPT, "sh", exec_id, *milliseconds]
        try:
            with translated(name):
                async with asyncio.timeout(grace + limit + _KILL_STARTS):
                    sockets = await self._incus.exec(name, command)
                    try:
                        await sockets.close_stdin()
                        said = await first(lambda: sockets.read("1"), KILLED_MAX, most=KILLED_MAX)
                        await sockets.result()
                    finally:
                        await sockets.aclose()
        except TimeoutError:
            raise Timeout(
                "the tenant did not end the command in time; restart the tenant to end all its processes"
            ) from None
        except (Flood, Lost):
            said = b""
        return killed(said)

    @contextlib.asynccontextmanager
    async def draining(self, name: str, terminal: str) -> AsyncIterator[None]:
        """Discard all input of a terminal while the context is open, at most `cancel_timeout` seconds.

        incusd waits forever for a terminal that accepts no input: it reads nothing else, and never reports
        the end of the command.
        """
        command = ["/bin/sh", "-c", DRAIN_SCRIPT, "sh", terminal]
        with translated(name), in_time(name, "terminal"):
            async with asyncio.timeout(self._limit):
                sockets = await self._incus.exec(name, command)
                try:
                    await sockets.read("1")
                    yield
                    await sockets.close_stdin()
                    await sockets.result()
                finally:
                    await sockets.aclose()
