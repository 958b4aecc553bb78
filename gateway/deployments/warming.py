"""Make golden copies of uploads, one at a time, when there is little else to do.

Making one costs as much as its deployment did. So it begins only while half of the places to deploy are
free and nobody waits, and the owners take turns.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from gateway.deployments.queue import DeploymentQueue
from gateway.errors import GatewayError
from gateway.runtime.sites import PreparedCopies, Recipe
from gateway.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wish:
    recipe: Recipe
    size: str


class Warming:
    """The uploads that are to be copied: the newest of each owner.

    Uploads beyond `upload_copies_waiting` bytes of memory are dropped: their tenants are made from the image.
    """

    def __init__(
        self,
        copies: PreparedCopies,
        turns: DeploymentQueue,
        admit: Callable[[], Awaitable[None]] | None,
        settings: Settings,
    ) -> None:
        self._copies, self._turns, self._admit, self._settings = copies, turns, admit, settings
        self._wishes: OrderedDict[str, _Wish] = OrderedDict()  # by owner, next one first
        self._task: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Drop all that wait."""
        self._wishes.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def want(self, recipe: Recipe, size: str) -> None:
        """Make a copy later of an upload that was deployed with that size, unless there is one."""
        before = self._wishes.pop(recipe.owner, None)
        held = sum(len(wish.recipe.archive) for wish in self._wishes.values())
        if held + len(recipe.archive) > self._settings.upload_copies_waiting:
            if before is not None:
                self._wishes[recipe.owner] = before
            return
        self._wishes[recipe.owner] = _Wish(recipe, size)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._fulfil(), name="copies of uploads")

    async def _fulfil(self) -> None:
        while self._wishes:
            await self._turns.quiet()
            if not self._wishes:
                return
            _, wish = self._wishes.popitem(last=False)
            over: asyncio.Future[GatewayError | None] = asyncio.get_running_loop().create_future()
            try:
                if self._admit is not None:
                    await self._admit()
                self._copies.prepare(wish.recipe, partial(_ended, over), wish.size)
                error = await over
            except GatewayError as refused:
                error = refused
            if error is not None:
                # not an event: others must not learn of this owner's upload
                log.info("cannot make a golden copy of an upload: %s", error.message)


def _ended(over: asyncio.Future[GatewayError | None], error: GatewayError | None) -> None:
    if not over.done():  # otherwise nobody waits any more
        over.set_result(error)
