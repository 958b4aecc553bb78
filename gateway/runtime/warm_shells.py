"""A pool of idle shells in tenants, so that a command starts without a request to Incus.

Starting a command through Incus's API takes several requests and a new process on the host; a warm shell
reads a line and becomes the command. For each tenant from which commands are expected, some shells of each
kind (pipes, terminal) are kept. A shell is used once and replaced in the background. It is discarded when it
is too old, when there are too many, and when its tenant's state changes.

Starting a shell costs CPU that the command which took the last one needs, so replacements start after a short
delay and one at a time. If commands arrive faster than that, replacements start at once and in parallel, and
the next commands wait for them, since a shell of their own would be ready even later.
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

from gateway.admission import Admission
from gateway.errors import GatewayError

log = logging.getLogger(__name__)

_PATIENCE: Final = 1.0  # seconds a command waits for a shell being started, which takes 15 ms

Key = tuple[str, bool]

# shells that wait in a tenant with a connected client, without a terminal and with one: an agent's commands
# come one after another, and the second is there before the first has been replaced
WANTED: Final[Mapping[bool, int]] = {False: 2, True: 1}
STARTS: Final = 2  # shells that are being started at once, of all tenants: each takes some 30 ms of CPU
DELAY: Final = (
    0.1  # seconds until a shell that was taken is replaced, so that its start takes no CPU from the command
)
AGE: Final = 900.0  # seconds that a shell waits before a fresh one takes its place
IDLE: Final = (
    120.0  # seconds that shells wait after a tenant's last client has left, as one that reloads comes back
)
"""The tenant, and whether the shell has a terminal."""


class WarmShell(Protocol):
    """A running shell that waits for its command line."""

    async def abandon(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _WaitingShell:
    key: Key
    shell: WarmShell
    expiry: asyncio.TimerHandle


@dataclass(slots=True, eq=False)
class _Filling:
    """A shell being started, either for a waiting command or for the pool."""

    key: Key
    begun: bool = False
    claim: asyncio.Future[WarmShell | None] | None = None
    task: asyncio.Task[WarmShell | None] | None = None


class WarmShells:
    """The warm shells of all tenants. Use it from the event loop only.

    `start` starts a shell and returns it once ready. At most `starts` are started at a time, one per tenant,
    `delay` seconds after a shell was taken or the previous one was started; if the last shell is taken within
    that time, all missing ones are started at once. `wanted` is the number per tenant with a terminal (key
    True) and without. At most `maximum` are kept in all; the oldest makes room. A shell is kept for at most
    `age` seconds, and for `idle` seconds after the last client has left.
    """

    def __init__(
        self,
        start: Callable[[str, bool], Awaitable[WarmShell]],
        *,
        maximum: int,
        wanted: Mapping[bool, int] = WANTED,
        starts: int = STARTS,
        delay: float = DELAY,
        age: float = AGE,
        idle: float = IDLE,
    ) -> None:
        self._start = start
        self._wanted = wanted
        self._maximum = maximum
        self._delay = delay
        self._age = age
        self._idle = idle
        self._waiting: list[_WaitingShell] = []  # oldest first
        self._starts = Admission[str]("shells being started", each=starts, total=starts)
        self._filling: list[_Filling] = []  # in the order of starting
        self._due: dict[str, asyncio.TimerHandle] = {}
        self._expected: Counter[str] = Counter()
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[Any]] = set()
        self._closed = False

    @contextlib.contextmanager
    def expect(self, tenant: str) -> Iterator[None]:
        """Keep shells for `tenant` while the context is open, and for the idle time after it."""
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

    def waiting(self, tenant: str, terminal: bool) -> list[WarmShell]:
        """Return a tenant's warm shells of one kind without taking them."""
        return [waiting.shell for waiting in self._waiting if waiting.key == (tenant, terminal)]

    async def take(self, tenant: str, terminal: bool) -> WarmShell | None:
        """Take a shell out of the pool; a replacement is started.

        Returns None if none is ready, or will be before one the caller starts itself.
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

    async def _claimed(self, key: Key) -> WarmShell | None:
        """Wait for a shell being started and return it; None if all are claimed by others or it fails."""
        tenant = key[0]
        if tenant in self._due:
            self._fill_now(tenant, burst=True)
        elif self._missing(tenant) is not None:
            self._fill_soon(tenant)
        soon = (one for one in self._filling if one.begun or self._starts.full(key[0]) is None)
        filling = next((one for one in soon if one.key == key and one.claim is None), None)
        if filling is None:
            return None
        claim: asyncio.Future[WarmShell | None] = asyncio.get_running_loop().create_future()
        filling.claim = claim
        try:
            async with asyncio.timeout(_PATIENCE):
                return await claim
        except TimeoutError:
            return None if claim.cancelled() else claim.result()  # it became ready at the same moment
        except asyncio.CancelledError:
            shell = None if claim.cancelled() else claim.result()
            if shell is not None:
                self._keep(key, shell)
            raise

    async def filled(self, seconds: float) -> None:
        """Return once one shell of each kind waits for every tenant that expects one, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._filling:
                    await asyncio.wait([one.task for one in self._filling if one.task is not None])

    def drop(self, tenant: str | None = None) -> None:
        """Discard the shells of a tenant whose state changed, or all, and schedule replacements."""
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
        """Discard all shells and wait until they are gone."""
        self._closed = True
        for leaving in self._leaving.values():
            leaving.cancel()
        self.drop()
        while self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)
            await asyncio.sleep(0)  # a start that has just succeeded is discarded only now

    def _missing(self, tenant: str) -> Key | None:
        """Return the next shell to start, of the kind with the fewest; None if none is missing."""
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
        """Start missing shells: one at a time, or all in a `burst`."""
        while (key := self._missing(tenant)) is not None:
            if not burst and any(one.key[0] == tenant for one in self._filling):
                break
            filling = _Filling(key)
            self._filling.append(filling)
            filling.task = asyncio.create_task(self._started(filling), name=f"standby {tenant}")
            filling.task.add_done_callback(partial(self._filled, filling))

    async def _started(self, filling: _Filling) -> WarmShell | None:
        tenant = filling.key[0]
        try:
            async with self._starts.slot(tenant):
                filling.begun = True
                if filling.claim is not None or self._keeps(tenant):
                    return await self._start(*filling.key)
        except GatewayError as error:
            # tenant not running or at its limits, or Incus away: the next command tries again
            log.debug("no standby shell for %s: %s", tenant, error.message)
        except Exception:  # the waiting command starts its own shell
            log.exception("a standby shell of %s did not start", tenant)
        return None

    def _filled(self, filling: _Filling, task: asyncio.Task[WarmShell | None]) -> None:
        """Hand a started shell to the command that waits for it, or put it into the pool."""
        if filling in self._filling:  # otherwise it was discarded
            self._filling.remove(filling)
        shell = None if task.cancelled() else task.result()
        tenant = filling.key[0]
        if filling.claim is not None and not filling.claim.done():
            filling.claim.set_result(shell)
            if shell is not None:
                self._fill(tenant, burst=True)
        elif shell is not None and self._keep(filling.key, shell) and self._missing(tenant) is not None:
            self._fill_soon(tenant)

    def _keep(self, key: Key, shell: WarmShell) -> bool:
        """Put a shell into the pool; return whether there is room for more."""
        loop = asyncio.get_running_loop()
        waiting: _WaitingShell = _WaitingShell(
            key, shell, loop.call_later(self._age, lambda: self._expired(waiting))
        )
        self._waiting.append(waiting)
        if not self._keeps(key[0]):
            self._give_up(waiting)
        if len(self._waiting) > self._maximum:
            self._give_up(self._waiting[0])
            return False
        return True

    def _expired(self, waiting: _WaitingShell) -> None:
        self._give_up(waiting)
        self._fill(waiting.key[0])

    def _give_up(self, waiting: _WaitingShell) -> None:
        self._waiting.remove(waiting)
        waiting.expiry.cancel()
        task = asyncio.create_task(waiting.shell.abandon())
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("cannot end a standby shell: %s", error)
