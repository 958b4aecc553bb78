"""Knows which shells are kept waiting for a command, so that one starts without asking Incus.

Starting a command through Incus's API costs several requests and a new process on the host; a shell that
is already there takes a line and becomes it. For a tenant from which commands are expected one shell of
each kind (pipes, terminal) is kept; a shell is used once, replaced in the background, and given up when
it is too old, when too many are kept, and when anything happens to its tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from gateway.errors import GatewayError

log = logging.getLogger(__name__)

Key = tuple[str, bool]
"""A tenant, and whether the shell has a terminal."""


class Shell(Protocol):
    """A started shell that waits for its line."""

    async def abandon(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    shell: Shell
    expiry: asyncio.TimerHandle


class Standbys:
    """The waiting shells of all tenants. Used from the event loop only.

    `start` makes one and returns once it is ready. At most `maximum` wait; the one that waits longest
    makes room. A shell waits `age` seconds at most, and `idle` seconds after the last that expected it.
    """

    def __init__(
        self, start: Callable[[str, bool], Awaitable[Shell]], *, maximum: int, age: float, idle: float
    ) -> None:
        self._start = start
        self._maximum = maximum
        self._age = age
        self._idle = idle
        self._waiting: OrderedDict[Key, _Waiting] = OrderedDict()
        self._filling: dict[Key, asyncio.Task[None]] = {}
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
        for terminal in (False, True):
            self._fill((tenant, terminal))
        try:
            yield
        finally:
            self._expected[tenant] -= 1
            if not self._expected[tenant]:
                del self._expected[tenant]
                if not self._closed:
                    loop = asyncio.get_running_loop()
                    self._leaving[tenant] = loop.call_later(self._idle, self._left, tenant)

    def take(self, tenant: str, terminal: bool) -> Shell | None:
        """Return a waiting shell, which is the caller's from now on, or None; another is started for it."""
        waiting = self._waiting.pop((tenant, terminal), None)
        self._fill((tenant, terminal))
        if waiting is None:
            return None
        waiting.expiry.cancel()
        return waiting.shell

    def drop(self, tenant: str | None = None) -> None:
        """Give up the shells of a tenant to which something happened, or all."""
        for key in [key for key in self._waiting if tenant in (None, key[0])]:
            self._give_up(key)
        for key, task in self._filling.items():
            if tenant in (None, key[0]):
                task.cancel()

    async def aclose(self) -> None:
        """Give up all shells and wait until none is left."""
        self._closed = True
        for leaving in self._leaving.values():
            leaving.cancel()
        filling = list(self._filling.values())
        self.drop()
        await asyncio.gather(*filling, *self._ending, return_exceptions=True)

    def _wanted(self, tenant: str) -> bool:
        return (
            bool(self._maximum) and not self._closed and (tenant in self._expected or tenant in self._leaving)
        )

    def _left(self, tenant: str) -> None:
        del self._leaving[tenant]
        self.drop(tenant)

    def _fill(self, key: Key) -> None:
        if self._wanted(key[0]) and key not in self._waiting and key not in self._filling:
            task = asyncio.create_task(self._filled(key), name=f"standby {key[0]}")
            self._filling[key] = task

    async def _filled(self, key: Key) -> None:
        try:
            shell = await self._start(*key)
        except GatewayError as error:
            # not running, at its limits, Incus away: the next command tries again
            log.debug("no standby for %s: %s", key[0], error.message)
            return
        finally:
            del self._filling[key]
        expiry = asyncio.get_running_loop().call_later(self._age, self._expired, key)
        self._waiting[key] = _Waiting(shell, expiry)
        if not self._wanted(key[0]):
            self._give_up(key)
        while len(self._waiting) > self._maximum:
            self._give_up(next(iter(self._waiting)))

    def _expired(self, key: Key) -> None:
        self._give_up(key)
        self._fill(key)

    def _give_up(self, key: Key) -> None:
        waiting = self._waiting.pop(key)
        waiting.expiry.cancel()
        task = asyncio.create_task(waiting.shell.abandon())
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a standby did not end well: %s", error)
