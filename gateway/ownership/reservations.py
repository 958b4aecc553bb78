"""Names that belong to one member of the whole cluster, such as the domain of one of its tenants."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import orjson

from gateway.errors import Unavailable

_TRIES: Final = 10  # of a name that other members keep taking and releasing at the same time


class Keys(Protocol):
    """Short texts by key, the same for all gateways of a cluster.

    Each method raises `Unavailable`, with a `reason`, within a bounded time if the cluster cannot decide.
    Then it is not known whether a swap was made: make one that can be repeated.
    """

    async def get(self, key: str) -> str | None:
        """Return the value of a key, None if there is none."""
        ...

    async def listed(self, prefix: str) -> Mapping[str, str]:
        """Return all keys that begin with `prefix`, with their values."""
        ...

    async def swap(self, key: str, before: str | None, after: str | None) -> bool:
        """Set a key if its value is `before`; return whether it was. None stands for no key.

        Raises `RateLimited` if there are too many keys.
        """
        ...


class SharedKeys(Keys, Protocol):
    """Keys that report their changes."""

    def changes(self) -> AsyncIterator[None]:
        """Yield when the keys can be read, and after each change by anyone, until the connection breaks.

        Then it raises `Unavailable`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a name: a tenant, and the member that decides about the name for it."""

    member: str
    tenant: str


class Reservations:
    """The names of one kind. Each is held by the gateway of one member until that releases it.

    What a member holds while it is away stays its own, since its tenants are there when it is back. Once it
    is no longer a member of the cluster, anybody may take it.
    """

    def __init__(
        self,
        keys: SharedKeys,
        kind: str,
        own: str,
        members: Callable[[], Awaitable[Collection[str]]],
    ) -> None:
        """`own` is the name of this gateway's member; `members` returns those of all, or raises."""
        self._keys, self._kind, self._own, self._members = keys, kind, own, members

    async def take(self, name: str, tenant: str, *, here: bool = False) -> bool:
        """Take a name for a tenant of this member; return whether it has it now. Idempotent.

        If the tenant is known to be `here`, it keeps what another member took for it: it has moved. Raises
        `Unavailable` if the cluster cannot decide, and `RateLimited` if it shares too many keys.
        """
        key, wanted = self._key(name), Holder(self._own, tenant)
        for _ in range(_TRIES):
            found = await self._keys.get(key)
            holder = _parsed(found)
            if holder == wanted:
                return True
            if holder is not None and holder.member != self._own:
                moved = here and holder.tenant == tenant
                if not moved and holder.member in await self._members():
                    return False
            if await self._keys.swap(key, found, _text(wanted)):
                return True
        raise Unavailable(f"other members keep taking and releasing {name}; try again", reason="contended")

    async def leave(self, name: str) -> None:
        """Release a name, if this member has it. Raises `Unavailable`."""
        key = self._key(name)
        found = await self._keys.get(key)
        holder = _parsed(found)
        if holder is not None and holder.member == self._own:
            await self._keys.swap(key, found, None)

    async def held(self) -> Mapping[str, Holder]:
        """Return all names with their holders. Raises `Unavailable`."""
        start = self._key("")
        listed = await self._keys.listed(start)
        holders = {key.removeprefix(start): _parsed(value) for key, value in listed.items()}
        return {name: holder for name, holder in holders.items() if holder is not None}

    @property
    def own(self) -> str:
        """The name of this gateway's member."""
        return self._own

    def _key(self, name: str) -> str:
        return f"{self._kind}.{name}"


def _text(holder: Holder) -> str:
    return orjson.dumps([holder.member, holder.tenant]).decode()


def _parsed(text: str | None) -> Holder | None:
    """Return the holder that a value names, None for no value; one that an operator spoilt is nobody's."""
    try:
        member, tenant = orjson.loads(text or "")
    except (ValueError, TypeError):
        return None
    return Holder(str(member), str(tenant))
