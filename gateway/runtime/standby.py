"""Knows which shells are kept waiting for a command, so that one starts without asking Incus.

Starting a command through Incus's API costs several requests and a new process on the host; a shell that
is already there takes a line and becomes it. For a tenant from which commands are expected some shells of
each kind (pipes, terminal) are kept; a shell is used once, replaced in the background, and given up when
it is too old, when too many are kept, and when anything happens to its tenant.

Starting one costs CPU that the command which took the last one wants for itself, so the replacement comes a
moment later, a few at a time. Who needs more than wait in that time gets none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from gateway.errors import GatewayError

log = logging.getLogger(__name__)

Key = tuple[str, bool]
"""A tenant, and whether the shell has a terminal."""


class Shell(Protocol):
    """A started shell that waits for its line."""

    async def abandon(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    key: Key
    shell: Shell
    expiry: asyncio.TimerHandle


class Standbys:
    """The waiting shells of all tenants. Used from the event loop only.

    `start` makes one and returns once it is ready; at most `starts` are made at a time, of one tenant a
    single one, `delay` seconds after a shell was taken or the one before it was made. `wanted` says how many
    of each kind (by whether it has a terminal) a tenant has. At most `maximum` wait; the one that waits
    longest makes room. A shell waits `age` seconds at most, and `idle` seconds after the last that expected
    it.
    """

    def __init__(
        self,
        start: Callable[[str, bool], Awaitable[Shell]],
        *,
        wanted: Mapping[bool, int],
        maximum: int,
        starts: int,
        delay: float,
        age: float,
        idle: float,
    ) -> None:
        self._start = start
        self._wanted = wanted
        self._maximum = maximum
        self._delay = delay
        self._age = age
        self._idle = idle
        self._waiting: list[_Waiting] = []  # the one that waits longest first
        self._starts = asyncio.Semaphore(starts)
        self._filling: dict[str, asyncio.Task[None]] = {}
        self._due: dict[str, asyncio.TimerHandle] = {}
        self._expected: Counter[str] = Counter()
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    @contextlib.contextmanager
    def expect(self, tenant: str) -> Iterator[None]:
        """Keep shells for `tenant` while the context is open, and a while after."""
        self._expected[tenant] += 1
        leaving = self._leaving.pop(tenant, None)
        if leaving is not None:
            leaving.cancel()
        self._fill(tenant)
        try:
            yield
        finally:
            self._expected[tenant] -= 1
            if not self._expected[tenant]:
                del self._expected[tenant]
                if not self._closed:
                    loop = asyncio.get_running_loop()
                    self._leaving[tenant] = loop.call_later(self._idle, self._left, tenant)

    def waiting(self, tenant: str, terminal: bool) -> list[Shell]:
        """Return the shells of one kind that wait in a tenant; they stay where they are."""
        return [waiting.shell for waiting in self._waiting if waiting.key == (tenant, terminal)]

    def take(self, tenant: str, terminal: bool) -> Shell | None:
        """Return a waiting shell, which is the caller's from now on, or None; another is started for it."""
        taken = next((one for one in self._waiting if one.key == (tenant, terminal)), None)
        if taken is not None:
            self._waiting.remove(taken)
            taken.expiry.cancel()
        if self._missing(tenant) is not None:
            self._fill_soon(tenant)
        return None if taken is None else taken.shell

    def drop(self, tenant: str | None = None) -> None:
        """Give up the shells of a tenant to which something happened, or all; try to start others."""
        for waiting in list(self._waiting):
            if tenant in (None, waiting.key[0]):
                self._give_up(waiting)
        for name in list(self._due):
            if tenant in (None, name):
                self._due.pop(name).cancel()
        for name, task in self._filling.items():
            if tenant in (None, name):
                task.cancel()
        for name in {*self._expected, *self._leaving}:
            if tenant in (None, name) and self._missing(name) is not None:
                self._fill_soon(name)

    async def aclose(self) -> None:
        """Give up all shells and wait until none is left."""
        self._closed = True
        for leaving in self._leaving.values():
            leaving.cancel()
        filling = list(self._filling.values())
        self.drop()
        await asyncio.gather(*filling, *self._ending, return_exceptions=True)

    def _missing(self, tenant: str) -> Key | None:
        """Return what is to be started next: of a kind of which there are fewest."""
        if self._closed or not self._maximum or not (tenant in self._expected or tenant in self._leaving):
            return None
        have = {terminal: len(self.waiting(tenant, terminal)) for terminal in (False, True)}
        lacking = [(have[kind], kind) for kind in have if have[kind] < self._wanted[kind]]
        return (tenant, min(lacking)[1]) if lacking else None

    def _left(self, tenant: str) -> None:
        del self._leaving[tenant]
        self.drop(tenant)

    def _fill_soon(self, tenant: str) -> None:
        if tenant not in self._due:
            loop = asyncio.get_running_loop()
            self._due[tenant] = loop.call_later(self._delay, self._fill_now, tenant)

    def _fill_now(self, tenant: str) -> None:
        del self._due[tenant]
        self._fill(tenant)

    def _fill(self, tenant: str) -> None:
        if tenant not in self._filling and self._missing(tenant) is not None:
            self._filling[tenant] = asyncio.create_task(self._filled(tenant), name=f"standby {tenant}")

    async def _filled(self, tenant: str) -> None:
        try:
            async with self._starts:
                key = self._missing(tenant)
                if key is None:
                    return
                shell = await self._start(*key)
        except GatewayError as error:
            # not running, at its limits, Incus away: the next command tries again
            log.debug("no standby for %s: %s", tenant, error.message)
            return
        finally:
            del self._filling[tenant]
        loop = asyncio.get_running_loop()
        waiting: _Waiting = _Waiting(key, shell, loop.call_later(self._age, lambda: self._expired(waiting)))
        self._waiting.append(waiting)
        if not (tenant in self._expected or tenant in self._leaving) or self._closed:
            self._give_up(waiting)
        if len(self._waiting) > self._maximum:
            self._give_up(self._waiting[0])
        elif self._missing(tenant) is not None:
            self._fill_soon(tenant)

    def _expired(self, waiting: _Waiting) -> None:
        self._give_up(waiting)
        self._fill(waiting.key[0])

    def _give_up(self, waiting: _Waiting) -> None:
        self._waiting.remove(waiting)
        waiting.expiry.cancel()
        task = asyncio.create_task(waiting.shell.abandon())
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a standby did not end well: %s", error)
