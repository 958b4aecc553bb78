"""One door for each tenant. It is closed while the tenant moves: calls wait, and then go to its new home."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final

from gateway.admission import Admission
from gateway.errors import Unavailable

PATIENCE: Final = 30.0  # seconds that a call waits for a tenant that is moving, far more than a move takes
WAITING: Final = 200  # calls and connections that wait for one tenant
_RETRY_AFTER: Final = 5


class Doors:
    """The doors of one gateway's tenants, all of them open. Used from the event loop only."""

    def __init__(self) -> None:
        self._closed: dict[str, asyncio.Event] = {}
        self._waiting = Admission[str](
            "calls that wait until it has moved to another server",
            each=WAITING,
            retry_after=_RETRY_AFTER,
        )
        self._inside: dict[str, int] = {}  # calls under way, of tenants that have any
        self._emptied: dict[str, asyncio.Event] = {}  # of tenants whose last call is waited for
        self.check: Callable[[str], None] = lambda tenant: None
        """Raises `Unavailable` for a tenant that may not be served here at all."""
        self._streams: defaultdict[str, set[Callable[[], None]]] = defaultdict(set)

    def close(self, tenant: str) -> None:
        """Make calls wait from now on. Idempotent."""
        self._closed.setdefault(tenant, asyncio.Event())

    def end_streams(self, tenant: str | None = None) -> None:
        """End the streams of a tenant, or of all, which would otherwise stay open."""
        for name in [*self._streams] if tenant is None else [tenant]:
            for end in list(self._streams.get(name, ())):
                end()

    def open(self, tenant: str) -> None:
        """Let all calls continue. Idempotent."""
        if (door := self._closed.pop(tenant, None)) is not None:
            door.set()

    def closed(self, tenant: str) -> bool:
        """Return whether a call would have to wait."""
        try:
            self.check(tenant)
        except Unavailable:
            return True
        return tenant in self._closed

    async def wait(self, tenant: str) -> None:
        """Wait while the door is closed. Raises `Unavailable` after a while, and `RateLimited`."""
        self.check(tenant)
        door = self._closed.get(tenant)
        if door is None:
            return
        try:
            with self._waiting.reserve(tenant):
                async with asyncio.timeout(PATIENCE):
                    while door is not None:
                        await door.wait()
                        door = self._closed.get(tenant)
        except TimeoutError:
            raise Unavailable(
                f"tenant {tenant} is moving to another server; try again soon",
                reason="moving",
                retry_after=_RETRY_AFTER,
            ) from None

    def inside(self, tenant: str) -> AbstractContextManager[None]:
        """Count as a call under way while the context is open."""
        return _Inside(self, tenant)

    def _enter(self, tenant: str) -> None:
        self._inside[tenant] = self._inside.get(tenant, 0) + 1

    def _leave(self, tenant: str) -> None:
        if (left := self._inside[tenant] - 1) > 0:
            self._inside[tenant] = left
            return
        del self._inside[tenant]
        if (emptied := self._emptied.pop(tenant, None)) is not None:
            emptied.set()

    @contextlib.contextmanager
    def stream(self, tenant: str, end: Callable[[], None]) -> Iterator[None]:
        """Have `end` called by `end_streams` while the context is open."""
        self._streams[tenant].add(end)
        try:
            yield
        finally:
            self._streams[tenant].discard(end)
            if not self._streams[tenant]:
                del self._streams[tenant]

    async def empty(self, tenant: str, seconds: float) -> bool:
        """Wait until no call is under way any more; return False if some take longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while tenant in self._inside:
                    await self._emptied.setdefault(tenant, asyncio.Event()).wait()
        return tenant not in self._inside


class _Inside:
    """One call. Each call has one, so it is a class: a generator's context costs four times as much."""

    __slots__ = ("_doors", "_tenant")

    def __init__(self, doors: Doors, tenant: str) -> None:
        self._doors = doors
        self._tenant = tenant

    def __enter__(self) -> None:
        self._doors._enter(self._tenant)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._doors._leave(self._tenant)
