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
# the same of a tenant that was brought back: its old home may be away for long
_AWAY: Final = 3650 * 86_400.0
_LOST: Final = "lost-"  # of such a decision, with the suspicion that led to it


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
            # as long as before, if its old home may still come back with it
            until = max(round(time.time() + _MOVING), round(_parsed(found)[1]))
            value = orjson.dumps([member, until, move]).decode()
            if await self._keys.swap(key, found, value):
                return
        raise Unavailable(f"other members keep choosing a home for {tenant}; try again", reason="contended")

    async def decided(self, tenant: str, move: str) -> bool:
        """Return whether a move was decided. Raises `Unavailable` if the cluster cannot say."""
        return _move(await self._keys.get(_KIND + tenant))[1] == move

    async def after(self, tenant: str, home: str, wish: str, suspicion: str) -> str:
        """Return the member that gets a tenant of `home`, maybe lost: the one chosen earlier, or `wish`.

        The first to ask decides: the home itself, once it is back, or the member with the copy. Raises
        `Unavailable` if the cluster cannot decide.
        """
        key, mark = _KIND + tenant, _LOST + suspicion
        for _ in range(_TRIES):
            found = await self._keys.get(key)
            member, _ = _parsed(found)
            if _move(found)[1] == mark or (member not in ("", home) and member in await self._members()):
                return member  # decided, or it has another home since
            until = round(time.time() + (self._kept if wish == home else _AWAY))
            if await self._keys.swap(key, found, orjson.dumps([wish, until, mark]).decode()):
                return wish
        raise Unavailable(f"other members keep deciding about {tenant}; try again", reason="contended")

    async def taken(self, member: str) -> Collection[str]:
        """Return the tenants that `after` has given to a member. Raises `Unavailable`."""
        listed = {key: _move(value) for key, value in (await self._keys.listed(_KIND)).items()}
        return {
            key.removeprefix(_KIND)
            for key, (home, mark) in listed.items()
            if home == member and mark.startswith(_LOST)
        }

    async def is_member(self, name: str) -> bool:
        """Return whether the cluster has a member of this name. Raises `Unavailable` if it cannot say."""
        return name in await self._members()

    async def back(self, tenant: str, member: str, suspicion: str) -> None:
        """Let a decision of `after` expire, once the lost home is back without the tenant.

        The decision of a later move of the tenant expires too.
        """
        key = _KIND + tenant
        found = await self._keys.get(key)
        home, mark = _move(found)
        if mark == _LOST + suspicion:
            await self._let_go(key, found, member)
        elif home == member and not mark.startswith(_LOST):
            value = orjson.dumps([home, round(time.time() + _MOVING), mark]).decode()
            await self._keys.swap(key, found, value)

    async def settle(self, tenant: str, member: str, move: str) -> None:
        """Let a move's decision expire, once all members have seen where the tenant is.

        If the tenant's lost home may return with it, the decision stays until `back`.
        """
        key = _KIND + tenant
        found = await self._keys.get(key)
        if _move(found) == (member, move) and _parsed(found)[1] < time.time() + 2 * _MOVING:
            await self._let_go(key, found, member)

    async def _let_go(self, key: str, found: str | None, member: str) -> None:
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
