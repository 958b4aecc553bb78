"""The queue of deployments, and the golden copies of uploads that are made while it is short."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from gateway.admission import Admission
from gateway.deployments.request import DeploymentOwner
from gateway.errors import GatewayError
from gateway.limits.capacity import DiskSpace
from gateway.runtime.sites import PreparedCopies, Recipe
from gateway.settings import Settings

WAITING: Final = 256  # deployments that run or wait, half of them from one owner
WAITING_BYTES: Final = 256 << 20  # of their uploads, which are held in memory; half of it for one owner
PENDING_BYTES: Final = 64 << 20  # of uploads that are held in memory until their golden copy is made
# seconds after which a waiting one may have begun
_RETRY_AFTER: Final = 10


class DeploymentQueue:
    """Lets `max_deployments` run at once and others wait. Used from the event loop only.

    An owner whose token names tenants never has more than half of the places to run. One that covers every
    tenant leaves one place free, and takes no more than half while another owner waits. Waiting owners take
    turns. No owner has more than half of the places to wait, nor of the bytes of waiting uploads.
    """

    def __init__(self, settings: Settings) -> None:
        most = settings.max_deployments
        self._most = most
        self._places = Admission[DeploymentOwner]("deployments at once", each=self._share, total=most)
        self._admitted = Admission[DeploymentOwner](
            "deployments that run or wait", each=WAITING // 2, total=WAITING, retry_after=_RETRY_AFTER
        )
        self._uploads = Admission[DeploymentOwner](
            "bytes of waiting deployments",
            each=WAITING_BYTES // 2,
            total=WAITING_BYTES,
            retry_after=_RETRY_AFTER,
        )
        self._asked = 0  # that wait for a place
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def quiet(self) -> None:
        """Wait until no deployment waits and half of the places are free."""
        await self._quiet.wait()

    def admit(self, owner: DeploymentOwner, size: int) -> contextlib.ExitStack:
        """Count one more that runs or waits, with an upload of `size` bytes, until the stack is closed.

        Raises `RateLimited`.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._admitted.reserve(owner))
            stack.enter_context(self._uploads.reserve(owner, size))
            return stack.pop_all()

    @contextlib.asynccontextmanager
    async def turn(self, owner: DeploymentOwner) -> AsyncIterator[None]:
        """Wait for a place to run, and hold it while the context is open."""
        self._asked += 1
        self._look()
        try:
            place = await self._places.acquire(owner)
        finally:
            self._asked -= 1
            self._look()
        try:
            with place:
                yield
        finally:
            self._look()

    def _share(self, owner: DeploymentOwner) -> int:
        """Return how many places an owner may have now."""
        if owner.tenants is None and not self._places.awaited_by_others(owner):
            return max(1, self._most - 1)
        return max(1, self._most // 2)

    def _look(self) -> None:
        if not self._asked and self._places.held <= self._most // 2:
            self._quiet.set()
        else:
            self._quiet.clear()


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _PendingCopy:
    recipe: Recipe
    size: str


class Warming:
    """The uploads that are to be copied: the newest of each owner.

    Uploads beyond `PENDING_BYTES` bytes of memory are dropped: their tenants are made from the image.
    """

    def __init__(self, copies: PreparedCopies, turns: DeploymentQueue, room: DiskSpace | None) -> None:
        self._copies, self._turns, self._room = copies, turns, room
        self._wishes: OrderedDict[str, _PendingCopy] = OrderedDict()  # by owner, next one first
        self._task: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Drop all that wait."""
        self._wishes.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def want(self, recipe: Recipe, size: str) -> None:
        """Make a golden copy of a deployed upload later, unless one exists."""
        before = self._wishes.pop(recipe.owner, None)
        held = sum(len(wish.recipe.archive) for wish in self._wishes.values())
        if held + len(recipe.archive) > PENDING_BYTES:
            if before is not None:
                self._wishes[recipe.owner] = before
            return
        self._wishes[recipe.owner] = _PendingCopy(recipe, size)
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
                if self._room is not None:
                    await self._room.spacious()
                self._copies.prepare(wish.recipe, partial(_ended, over), wish.size)
                error = await over
            except GatewayError as refused:
                error = refused
            if error is not None:
                # not an event: others must not learn of this owner's upload
                log.info("cannot make a golden copy of an upload: %s", error.message)


def _ended(over: asyncio.Future[GatewayError | None], error: GatewayError | None) -> None:
    if not over.done():  # otherwise its waiter was cancelled
        over.set_result(error)
