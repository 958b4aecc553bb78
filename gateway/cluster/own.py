"""The tenants of this member, as they are reported to the peers that follow them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

from gateway.cluster.known import Known, first, lines
from gateway.errors import GatewayError

log = logging.getLogger(__name__)

PROTOCOL: Final = 2
"""Of what gateways say to one another. A gateway passes over what a higher one says besides, and expects of a
lower one what that knows: 1 tells tenants and answers questions, 2 takes orders, such as moves.
"""
BEAT: Final = 1.0
"""Seconds after which something is told in any case, so that silence means something."""
_TOGETHER: Final = 0.02  # seconds in which changes are taken together
_RESYNC: Final = 10.0  # seconds after which is looked without being asked to


class Own:
    """The tenants of this member. `list` returns them; it is called again after each `changed`.

    `facts` is sent with each first line: what peers need to know about this gateway itself.
    """

    def __init__(self, list: Callable[[], Awaitable[Iterable[Known]]], facts: Mapping[str, Any]) -> None:
        self.tenants: dict[str, Known] = {}
        self._looked = False  # before that nobody is told that these are all
        self._list = list
        self._facts = facts
        self._asked = asyncio.Event()
        self._followers: set[asyncio.Event] = set()
        self._ended = False

    def changed(self) -> None:
        """Check the tenants again soon, since one has changed."""
        self._asked.set()

    def end(self) -> None:
        """End all reports: the peers that follow ask again, and reach the next process."""
        self._ended = True
        for wake in self._followers:
            wake.set()

    async def look(self) -> None:
        """Keep `tenants` up to date, forever."""
        while True:
            self._asked.clear()
            again = _RESYNC
            try:
                found = first(await self._list())
            except GatewayError as error:
                log.info("cannot list this member's tenants now: %s", error.message)
                again = BEAT
            else:
                if not self._looked or found != self.tenants:
                    self._looked, self.tenants = True, found
                    for wake in self._followers:
                        wake.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(again):
                    await self._asked.wait()
            await asyncio.sleep(_TOGETHER)

    async def follow(self, wake: asyncio.Event) -> AsyncGenerator[dict[str, Any]]:
        """Yield all tenants, then `{"whole": true}`, then each change; an empty line where nothing happens.

        Until the tenants are known, only empty lines come.
        A slow reader gets only the difference to what it was sent last, however many changes there were.
        Setting `wake` makes the next line come at once.
        """
        told: Mapping[str, Known] = {}
        yield {"v": PROTOCOL, **self._facts}
        self._followers.add(wake)
        try:
            last: dict[str, Any] = {"whole": True}
            while not self._ended:
                wake.clear()
                if self._looked:
                    now = self.tenants
                    for line in lines(told, now):
                        yield line
                    told = now
                    yield last
                    last = {}
                else:  # only that this gateway is there
                    yield {}
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BEAT):
                        await wake.wait()
        finally:
            self._followers.discard(wake)
