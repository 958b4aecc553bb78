"""Keys that several gateways of one test share, as those of a cluster do in Incus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from gateway.cluster.keys import check
from gateway.errors import Unavailable
from gateway.incus.members import NO_QUORUM


class MemoryKeys:
    """Implements `SharedKeys` in memory; `tests/unit/test_shared_keys.py` holds it to what Incus does.

    Without `quorum` nothing is answered.
    """

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.quorum = True
        self.swaps = 0
        self._told = asyncio.Event()

    async def get(self, key: str) -> str | None:
        check(key)
        await self._asked()
        return self.values.get(key)

    async def listed(self, prefix: str) -> Mapping[str, str]:
        await self._asked()
        return {key: value for key, value in self.values.items() if key.startswith(prefix)}

    async def swap(self, key: str, before: str | None, after: str | None) -> bool:
        check(key, after)
        await self._asked()
        if self.values.get(key) != before:
            return False
        self.swaps += 1
        if after is None:
            self.values.pop(key, None)
        else:
            self.values[key] = after
        await self.tell()
        return True

    async def changes(self) -> AsyncIterator[None]:
        while True:
            told = self._told
            await self._asked()
            yield
            await told.wait()

    async def tell(self) -> None:
        """Have all who follow the changes look again; they break off where there is no quorum."""
        self._told.set()
        self._told = asyncio.Event()
        await asyncio.sleep(0)

    async def _asked(self) -> None:
        await asyncio.sleep(0)  # others have their turn, as with Incus
        if not self.quorum:
            raise Unavailable("there is no quorum", reason=NO_QUORUM)
