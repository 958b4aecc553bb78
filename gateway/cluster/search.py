"""Asks all peers which of them has something, once for all who want to know at the same time.

When a tenant has moved, all calls that waited for it may look for it at once. A question for each of them to
each peer would keep all gateways from everything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gateway.cluster.peers import Peers

FIND: Final = "find"
"""What a peer is asked by whether it has something."""

Found = tuple[Mapping[str, Any], Sequence[str]]
"""The answers of peers, None for one that has none of it, and the names of those that did not answer."""
_What = tuple[tuple[str, str], ...]


class Search:
    """The questions that are on their way, and those that follow. Used from the event loop only."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._asking: dict[_What, asyncio.Task[Found]] = {}
        self._next: dict[_What, asyncio.Task[Found]] = {}

    async def ask(self, what: Mapping[str, str]) -> Found:
        """Return what the peers say, all of them after this was called."""
        key = tuple(sorted(what.items()))
        if key not in self._next:
            # one that is on its way may have been answered already, as it was before
            self._next[key] = asyncio.create_task(self._ask(key, self._asking.get(key)))
        return await asyncio.shield(self._next[key])  # others wait for it too

    async def _ask(self, key: _What, before: asyncio.Task[Found] | None) -> Found:
        if before is not None:
            await asyncio.wait([before])
        task = self._asking[key] = self._next.pop(key)
        try:
            return await self._peers.ask_all(f"/peer/ask/{FIND}", dict(key))
        finally:
            if self._asking.get(key) is task:
                del self._asking[key]
