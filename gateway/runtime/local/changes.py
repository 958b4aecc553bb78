"""What happens to tenants of the local runtime: all of it is done by this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Final

from gateway.runtime import TenantEvent
from gateway.runtime.local.disks import LocalDisks

_WAITING: Final = 1000  # changes that wait for a reader


class LocalChanges:
    """Implements `gateway.runtime.Changes`."""

    told: Sequence[str] = ()

    def __init__(self, disks: LocalDisks) -> None:
        self._disks = disks
        self._events: asyncio.Queue[TenantEvent] = asyncio.Queue(maxsize=_WAITING)

    async def watch(self) -> AsyncIterator[TenantEvent]:
        yield TenantEvent("gateway.resynced", None, {"tenants": len(self._disks.list())})
        while True:
            yield await self._events.get()

    def skip(self, told: Sequence[str]) -> None:
        pass

    def add(self, kind: str, name: str, **facts: str) -> None:
        """Make `watch` yield a change."""
        with contextlib.suppress(asyncio.QueueFull):  # a full queue has no reader
            self._events.put_nowait(TenantEvent(kind, name, facts))
