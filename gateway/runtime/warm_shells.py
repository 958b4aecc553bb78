"""Keep shells waiting in tenants, so that a command starts without asking Incus.

Starting a command through Incus's API costs several requests and a new process on the host; a shell that
is already there takes a line and becomes it. For a tenant from which commands are expected some shells of
each kind (pipes, terminal) are kept; a shell is used once, replaced in the background, and given up when
it is too old, when too many are kept, and when anything happens to its tenant.

Starting one costs CPU that the command which took the last one wants for itself, so the replacement comes a
moment later, and one at a time. Where commands come faster than that, the replacements are made at once and
beside each other, and the next commands wait for them: shells of their own would be ready later than those.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from gateway.errors import GatewayError

log = logging.getLogger(__name__)

_PATIENCE: Final = 1.0  # seconds that a command waits for a shell that is being started; it takes 15 ms

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


@dataclass(slots=True, eq=False)
class _Filling:
    """A shell that is being started, for the command that waits for it or to be kept."""

    key: Key
    begun: bool = False
    claim: asyncio.Future[Shell | None] | None = None
    task: asyncio.Task[Shell | None] | None = None


class WarmShells:
    """The waiting shells of all tenants. Used from the event loop only.

    `start` makes one and returns once it is ready. At most `starts` are made at a time, one of each tenant,
    `delay` seconds after a shell was taken or the one before it was made; if the last one is taken within
    that time, all missing ones are started at once. `wanted` says how many of each kind (with and without a
    terminal) a tenant has. At most `maximum` wait; the one that waits longest makes room. A shell waits at
    most `age` seconds, and `idle` seconds after the last client.
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
        self._filling: list[_Filling] = []  # the one that was begun first first
        self._due: dict[str, asyncio.TimerHandle] = {}
        self._expected: Counter[str] = Counter()
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[Any]] = set()
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

    async def take(self, tenant: str, terminal: bool) -> Shell | None:
        """Return a shell, which is the caller's from now on; another is started for it.

        None if none waits, or will be ready before one that the caller starts.
        """
        key = tenant, terminal
        taken = next((one for one in self._waiting if one.key == key), None)
        if taken is None:
            return await self._claimed(key)
        self._waiting.remove(taken)
        taken.expiry.cancel()
        if tenant in self._due and not self.waiting(*key):
            self._fill_now(tenant, burst=True)
        elif self._missing(tenant) is not None:
            self._fill_soon(tenant)
        return taken.shell

    async def _claimed(self, key: Key) -> Shell | None:
        """Return the shell that is being started, once it is ready; None if it is not for this caller."""
        tenant = key[0]
        if tenant in self._due:
            self._fill_now(tenant, burst=True)
        elif self._missing(tenant) is not None:
            self._fill_soon(tenant)
        soon = (one for one in self._filling if one.begun or not self._starts.locked())
        filling = next((one for one in soon if one.key == key and one.claim is None), None)
        if filling is None:
            return None
        claim: asyncio.Future[Shell | None] = asyncio.get_running_loop().create_future()
        filling.claim = claim
        try:
            async with asyncio.timeout(_PATIENCE):
                return await claim
        except TimeoutError:
            return None if claim.cancelled() else claim.result()  # it came in the same breath
        except asyncio.CancelledError:
            shell = None if claim.cancelled() else claim.result()
            if shell is not None:
                self._keep(key, shell)
            raise

    def drop(self, tenant: str | None = None) -> None:
        """Give up the shells of a tenant to which something happened, or all; try to start others."""
        for waiting in list(self._waiting):
            if tenant in (None, waiting.key[0]):
                self._give_up(waiting)
        for name in list(self._due):
            if tenant in (None, name):
                self._due.pop(name).cancel()
        for filling in list(self._filling):
            if tenant in (None, filling.key[0]) and filling.task is not None:
                self._filling.remove(filling)
                filling.task.cancel()
                self._ending.add(filling.task)
                filling.task.add_done_callback(self._ending.discard)
        for name in {*self._expected, *self._leaving}:
            if tenant in (None, name) and self._missing(name) is not None:
                self._fill_soon(name)

    async def aclose(self) -> None:
        """Give up all shells and wait until none is left."""
        self._closed = True
        for leaving in self._leaving.values():
            leaving.cancel()
        self.drop()
        while self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)
            await asyncio.sleep(0)  # a start that has just succeeded is given up only now

    def _missing(self, tenant: str) -> Key | None:
        """Return what is to be started next: of a kind of which there are fewest."""
        if not self._keeps(tenant):
            return None
        have = Counter(one.key for one in self._waiting) + Counter(one.key for one in self._filling)
        kinds = [kind for kind, wanted in self._wanted.items() if have[tenant, kind] < wanted]
        return (tenant, min(kinds, key=lambda kind: have[tenant, kind])) if kinds else None

    def _keeps(self, tenant: str) -> bool:
        expected = tenant in self._expected or tenant in self._leaving
        return expected and self._maximum > 0 and not self._closed

    def _left(self, tenant: str) -> None:
        del self._leaving[tenant]
        self.drop(tenant)

    def _fill_soon(self, tenant: str) -> None:
        if tenant not in self._due:
            loop = asyncio.get_running_loop()
            self._due[tenant] = loop.call_later(self._delay, self._fill_now, tenant)

    def _fill_now(self, tenant: str, burst: bool = False) -> None:
        self._due.pop(tenant).cancel()
        self._fill(tenant, burst=burst)

    def _fill(self, tenant: str, *, burst: bool = False) -> None:
        """Start what is missing: one at a time, in a `burst` all."""
        while (key := self._missing(tenant)) is not None:
            if not burst and any(one.key[0] == tenant for one in self._filling):
                break
            filling = _Filling(key)
            self._filling.append(filling)
            filling.task = asyncio.create_task(self._started(filling), name=f"standby {tenant}")
            filling.task.add_done_callback(partial(self._filled, filling))

    async def _started(self, filling: _Filling) -> Shell | None:
        tenant = filling.key[0]
        try:
            async with self._starts:
                filling.begun = True
                if filling.claim is not None or self._keeps(tenant):
                    return await self._start(*filling.key)
        except GatewayError as error:
            # not running, at its limits, Incus away: the next command tries again
            log.debug("no standby for %s: %s", tenant, error.message)
        except Exception:  # the waiting command starts its own
            log.exception("a standby of %s did not start", tenant)
        return None

    def _filled(self, filling: _Filling, task: asyncio.Task[Shell | None]) -> None:
        """Give a shell that was started to the command that waits for it, or have it wait."""
        if filling in self._filling:  # else it was given up
            self._filling.remove(filling)
        shell = None if task.cancelled() else task.result()
        tenant = filling.key[0]
        if filling.claim is not None and not filling.claim.done():
            filling.claim.set_result(shell)
            if shell is not None:
                self._fill(tenant, burst=True)
        elif shell is not None and self._keep(filling.key, shell) and self._missing(tenant) is not None:
            self._fill_soon(tenant)

    def _keep(self, key: Key, shell: Shell) -> bool:
        """Have a shell wait; return whether there is room for more."""
        loop = asyncio.get_running_loop()
        waiting: _Waiting = _Waiting(key, shell, loop.call_later(self._age, lambda: self._expired(waiting)))
        self._waiting.append(waiting)
        if not self._keeps(key[0]):
            self._give_up(waiting)
        if len(self._waiting) > self._maximum:
            self._give_up(self._waiting[0])
            return False
        return True

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
