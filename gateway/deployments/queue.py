"""The queue of deployments: each owner has a share of the running and of the waiting ones."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

import orjson

from gateway.admission import Admission
from gateway.auth.tokens import Token
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
        most, many, room = (
            settings.max_deployments,
            settings.waiting_deployments,
            settings.waiting_bytes,
        )
        self._most = most
        self._places = Admission[Owner]("deployments at once", each=self._share, total=most)
        self._admitted = Admission[Owner](
            "deployments that run or wait", each=max(1, many // 2), total=many, retry_after=_RETRY_AFTER
        )
        self._uploads = Admission[Owner](
            "bytes of waiting deployments", each=room // 2, total=room, retry_after=_RETRY_AFTER
        )
        self._asked = 0  # that wait for a place
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def quiet(self) -> None:
        """Wait until nobody waits and half of the places are free."""
        await self._quiet.wait()

    def admit(self, owner: Owner, size: int) -> contextlib.ExitStack:
        """Count one more that runs or waits, with an upload of `size` bytes, until the stack is closed.

        Raises `RateLimited`.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._admitted.reserve(owner))
            stack.enter_context(self._uploads.reserve(owner, size))
            return stack.pop_all()

    @contextlib.asynccontextmanager
    async def turn(self, owner: Owner) -> AsyncIterator[None]:
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

    def _share(self, owner: Owner) -> int:
        """Return how many places an owner may have now."""
        if owner.tenants is None and not self._places.awaited_by_others(owner):
            return max(1, self._most - 1)
        return max(1, self._most // 2)

    def _look(self) -> None:
        if not self._asked and self._places.held <= self._most // 2:
            self._quiet.set()
        else:
            self._quiet.clear()
