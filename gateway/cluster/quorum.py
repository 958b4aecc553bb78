"""Notices when Incus's database has no majority, so that requests that need it can be refused at once.

Incus itself says so after a minute. One whose leader has just died is as silent for some seconds, and then
answers all that waited: so a silent database counts only where most members' gateways are silent, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from gateway.cluster.peers import Peers
from gateway.errors import Unavailable

log = logging.getLogger(__name__)

_LOOK: Final = 0.5  # seconds


class Quorum:
    """Calls `tell` with whether the cluster can decide, whenever that changes.

    `ask` queries the database, and raises `Unavailable` soon if it does not answer.
    """

    def __init__(
        self, peers: Peers, ask: Callable[[], Awaitable[object]], tell: Callable[[bool], None]
    ) -> None:
        self._peers, self._ask, self._tell = peers, ask, tell
        self._there = True

    async def follow(self) -> None:
        """Check, forever."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK)

    async def look(self) -> None:
        """Check once."""
        there = not self._is_doubtful() or await self._answers()
        if there != self._there:
            self._there = there
            log.warning("the cluster decides again" if there else "the cluster has no quorum")
            self._tell(there)

    def _is_doubtful(self) -> bool:
        peers = self._peers.all.values()
        return 2 * (1 + sum(peer.alive for peer in peers)) <= 1 + len(peers)

    async def _answers(self) -> bool:
        try:
            await self._ask()
        except Unavailable:
            return False
        return True
