"""Ended commands that are kept for a while, limited by age, number and bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.execs.exec import Exec
from gateway.execs.notes import SHORT
from gateway.execs.shown import shortened
from gateway.limits.budget import Share
from gateway.settings import Settings


class Kept:
    """Ended commands of all tenants. `forgotten` is called with each command that is dropped."""

    def __init__(self, settings: Settings, forgotten: Callable[[Exec], None]) -> None:
        self._settings = settings
        self._forgotten = forgotten
        self._of: dict[str, dict[str, Exec]] = {}  # per tenant, oldest end first
        self._whole: dict[str, dict[Exec, int]] = {}  # those kept with their output: bytes
        self._held = 0  # their sum
        self._looks: set[asyncio.Task[None]] = set()

    def add(self, exec_: Exec) -> None:
        """Keep an ended command for a while; above the limits, drop the oldest commands' output first.

        A command with processes still running is kept until they end, so that they can be listed and killed,
        unless there are too many of these as well.
        """
        settings = self._settings
        loop = asyncio.get_running_loop()
        exec_.keeping = loop.call_later(settings.exec_keep, self._forget_in_time, exec_)
        of_tenant = self._of.setdefault(exec_.tenant, {})
        of_tenant[exec_.id] = exec_
        whole = self._whole.setdefault(exec_.tenant, {})
        whole[exec_] = exec_.kept_bytes
        self._held += exec_.kept_bytes
        for other in [*whole][: max(0, len(whole) - settings.exec_keep_count)]:
            self._shed(other)
        while self._held > settings.exec_keep_bytes:
            most = max(self._whole.values(), key=lambda of_one: sum(of_one.values()))
            self._shed(next(iter(most)))
        if len(of_tenant) > settings.exec_keep_exits:
            first = sorted(of_tenant.values(), key=lambda other: other.tree.lasting)
            for other in first[: len(first) - settings.exec_keep_exits]:
                self.forget(other)

    def make_room(self, tenant: str, share: Share, size: int) -> bool:
        """Return whether a tenant's share has room, for which its ended commands' output gives way.

        The oldest goes first, but none that is being read: its readers keep it in memory. A running command
        needs the room more: without it, it may be lost.
        """
        if share.full(size) is None:
            return True
        for exec_ in [*self._whole.get(tenant, {})]:
            if exec_.streams.kept and not exec_.readers:
                self._shed(exec_)
                if share.full(size) is None:
                    return True
        return False

    def _shed(self, exec_: Exec) -> None:
        self._forget_output(exec_)
        exec_.shed(shortened(exec_.spec, SHORT))

    def _forget_output(self, exec_: Exec) -> None:
        whole = self._whole.get(exec_.tenant, {})
        self._held -= whole.pop(exec_, 0)
        if not whole:
            self._whole.pop(exec_.tenant, None)

    def _forget_in_time(self, exec_: Exec) -> None:
        if exec_.tree.lasting:
            task = asyncio.create_task(self._forget_unless_it_lasts(exec_), name=f"look at {exec_.id}")
            self._looks.add(task)
            task.add_done_callback(self._looks.discard)
        else:
            self.forget(exec_)

    async def _forget_unless_it_lasts(self, exec_: Exec) -> None:
        await exec_.tree.look()
        if exec_.tree.lasting:
            loop = asyncio.get_running_loop()
            exec_.keeping = loop.call_later(self._settings.exec_keep, self._forget_in_time, exec_)
        else:
            self.forget(exec_)

    def forget(self, exec_: Exec) -> None:
        """Drop a command."""
        if exec_.keeping is not None:
            exec_.keeping.cancel()  # a pending timer would keep the command and all its output alive
        self._forget_output(exec_)
        exec_.let_go()
        exec_.streams.release()
        of_tenant = self._of.get(exec_.tenant, {})
        if of_tenant.get(exec_.id) is exec_:
            del of_tenant[exec_.id]
            if not of_tenant:
                del self._of[exec_.tenant]
        self._forgotten(exec_)

    async def close(self) -> None:
        """Cancel all pending checks."""
        for task in self._looks:
            task.cancel()
        await asyncio.gather(*self._looks, return_exceptions=True)
