"""Chooses the member for a tenant that does not exist yet: the same one, whichever gateway is asked.

So the gateway there sees all requests for it, and makes none of them twice. Once the tenant exists, its home
is where Incus has it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final

import orjson

from gateway.cluster.shared_keys import Keys
from gateway.errors import RateLimited, Unavailable

_KIND: Final = "home."
_MOST: Final = 2000  # names that are chosen for and have not expired
_SWEPT: Final = 20  # expired ones that are removed with each choice
_TRIES: Final = 10
_RETRY_AFTER: Final = 60
_MOVING: Final = 30 * 86_400.0  # seconds that a move's decision stands, for homes that are away meanwhile


class Placements:
    """The recent choices. `members` returns the names of the cluster's members, or raises.

    A choice stands for `kept` seconds, and as long as that is a member. A request that is repeated with its
    Idempotency-Key within that time finds the gateway that knows the key.
    """

    def __init__(self, keys: Keys, members: Callable[[], Awaitable[Collection[str]]], kept: float) -> None:
        self._keys, self._members, self._kept = keys, members, kept

    async def choose(self, tenant: str, wish: str) -> str:
        """Return the home of a tenant to be created: the member that was chosen before, or now `wish`.

        Raises `Unavailable` if the cluster cannot decide, and `RateLimited` if there are too many choices.
        Call it only for callers that may create the tenant.
        """
        key = _KIND + tenant
        for _ in range(_TRIES):
            listed, now = await self._keys.listed(_KIND), time.time()
            found = listed.get(key)
            member, until = _parsed(found)
            if until > now and (member == wish or member in await self._members()):
                return member
            expired = [(old, value) for old, value in listed.items() if _parsed(value)[1] <= now]
            if len(listed) - len(expired) >= _MOST:
                raise RateLimited(
                    f"{_MOST} tenants were placed in {self._kept:.0f} s, which is the limit; try again later",
                    retry_after=_RETRY_AFTER,
                )
            for old, value in expired[:_SWEPT]:
                if old != key:
                    await self._keys.swap(old, value, None)
            wanted = orjson.dumps([wish, round(now + self._kept)]).decode()
            if await self._keys.swap(key, found, wanted):
                return wish
        raise Unavailable(f"other members keep choosing a home for {tenant}; try again", reason="contended")

    async def move(self, tenant: str, member: str, move: str) -> None:
        """Decide that a tenant's home is another member from now on. Idempotent.

        Raises `Unavailable`: then `decided` tells whether it was, once the cluster can say.
        """
        key = _KIND + tenant
        for _ in range(_TRIES):
            found = await self._keys.get(key)
            if _move(found) == (member, move):
                return
            value = orjson.dumps([member, round(time.time() + _MOVING), move]).decode()
            if await self._keys.swap(key, found, value):
                return
        raise Unavailable(f"other members keep choosing a home for {tenant}; try again", reason="contended")

    async def decided(self, tenant: str, move: str) -> bool:
        """Return whether a move was decided. Raises `Unavailable` if the cluster cannot say."""
        return _move(await self._keys.get(_KIND + tenant))[1] == move

    async def is_member(self, name: str) -> bool:
        """Return whether the cluster has a member of this name. Raises `Unavailable` if it cannot say."""
        return name in await self._members()

    async def settle(self, tenant: str, member: str, move: str) -> None:
        """Let a move's decision expire, once all members have seen where the tenant is."""
        key = _KIND + tenant
        found = await self._keys.get(key)
        if _move(found) == (member, move):
            value = orjson.dumps([member, round(time.time() + self._kept)]).decode()
            await self._keys.swap(key, found, value)

    async def forget(self, tenant: str, member: str) -> None:
        """Take back the choice of this member, which could not create the tenant and left nothing behind."""
        key = _KIND + tenant
        found = await self._keys.get(key)
        if found is not None and _parsed(found)[0] == member:
            await self._keys.swap(key, found, None)


def _parsed(value: str | None) -> tuple[str, float]:
    """Return a choice's member and end. A missing or malformed one counts as ended."""
    try:
        member, until, *_ = orjson.loads(value or "")
        return str(member), float(until)
    except (ValueError, TypeError):
        return "", 0.0


def _move(value: str | None) -> tuple[str, str]:
    """Return the decided member and its move; no move for a choice of another kind."""
    try:
        member, _, move = orjson.loads(value or "")
        return str(member), str(move)
    except (ValueError, TypeError):
        return "", ""
