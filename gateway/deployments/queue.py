"""The queue of deployments: each owner has a share of the running and of the waiting ones."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

import orjson

from gateway.auth.tokens import Token
from gateway.errors import RateLimited
from gateway.settings import Settings

# seconds after which a waiting one may have begun
_RETRY_AFTER: Final = 10


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose share a deployment counts towards: the token's tenants or, if it covers all, its subject."""

    tenants: frozenset[str] | None
    subject: str

    @classmethod
    def of(cls, token: Token) -> Owner:
        return cls(token.coverage, token.subject if token.coverage is None else "")


def uploader(token: Token, ended: Callable[[str], float]) -> str:
    """Return the owner of uploads under a token; kept copies of them are reused for the same owner only.

    This is narrower than `Owner`: it always includes the subject, and somebody with a tenant's name that was
    another's before is a different owner.
    """
    names = None if token.coverage is None else [(name, ended(name)) for name in sorted(token.coverage)]
    return hashlib.sha256(orjson.dumps([token.subject, names])).hexdigest()[:32]


class DeploymentQueue:
    """Lets `max_deployments` run at once and `waiting_deployments` wait. Used from the event loop only.

    An owner whose token names tenants never has more than half of the places to run. One that covers every
    tenant leaves one place free, and takes no more than half while another owner waits. Waiting owners take
    turns. No owner has more than half of the places to wait, nor of the bytes of waiting uploads.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._running: Counter[Owner] = Counter()
        self._waiting: OrderedDict[Owner, deque[asyncio.Future[None]]] = OrderedDict()  # next one first
        self._admitted: Counter[Owner] = Counter()
        self._bytes: Counter[Owner] = Counter()
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def quiet(self) -> None:
        """Wait until nobody waits and half of the places are free."""
        await self._quiet.wait()

    def admit(self, owner: Owner, size: int) -> None:
        """Count one more that runs or waits, with an upload of `size` bytes. Raises `RateLimited`."""
        many, room = self._settings.waiting_deployments, self._settings.waiting_bytes
        if self._admitted.total() >= many or self._admitted[owner] >= _half(many):
            raise RateLimited(
                "too many deployments are waiting; try again when some have ended",
                limit=_half(many),
                retry_after=_RETRY_AFTER,
            )
        # a single one is never too large: the limit of a body applies to it
        full = self._bytes.total() + size > room and self._bytes.total() > 0
        if full or (self._bytes[owner] + size > room // 2 and self._bytes[owner] > 0):
            raise RateLimited(
                "the waiting deployments' uploads are too large in total; try again when some have ended",
                limit=room // 2,
                retry_after=_RETRY_AFTER,
            )
        self._admitted[owner] += 1
        self._bytes[owner] += size

    def leave(self, owner: Owner, size: int) -> None:
        """Undo what `admit` counted."""
        _less(self._admitted, owner, 1)
        _less(self._bytes, owner, size)

    @contextlib.asynccontextmanager
    async def turn(self, owner: Owner) -> AsyncIterator[None]:
        """Wait for a place to run, and hold it while the context is open."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(mine)
        self._next()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._end(owner)
            else:
                self._waiting[owner].remove(mine)
                self._tidy(owner)
                self._next()
            raise
        try:
            yield
        finally:
            self._end(owner)

    def _end(self, owner: Owner) -> None:
        _less(self._running, owner, 1)
        self._next()

    def _next(self) -> None:
        """Start those whose turn it is."""
        most = self._settings.max_deployments
        while self._running.total() < most:
            owner = next((owner for owner in self._waiting if self._may(owner)), None)
            if owner is None:
                break
            mine = self._waiting[owner].popleft()
            self._waiting.move_to_end(owner)
            self._tidy(owner)
            self._running[owner] += 1
            mine.set_result(None)
        if not self._waiting and self._running.total() <= most // 2:
            self._quiet.set()
        else:
            self._quiet.clear()

    def _may(self, owner: Owner) -> bool:
        most, has = self._settings.max_deployments, self._running[owner]
        if owner.tenants is None and len(self._waiting) == 1:
            return has < max(1, most - 1)
        return has < _half(most)

    def _tidy(self, owner: Owner) -> None:
        if not self._waiting[owner]:
            del self._waiting[owner]


def _half(many: int) -> int:
    return max(1, many // 2)


def _less(counter: Counter[Owner], owner: Owner, by: int) -> None:
    counter[owner] -= by
    if not counter[owner]:
        del counter[owner]
