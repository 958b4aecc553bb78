"""Tokens that are revoked at all gateways of a cluster.

A revocation is first kept here. Then the other gateways are told, and it is written to a key of the cluster.
There a gateway that was away finds it: at its start, after each connection to Incus, and when keys change.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gateway.auth.grants import KEPT, Revocations
from gateway.auth.issuing import MAX_TTL
from gateway.cluster.shared_keys import Keys
from gateway.errors import GatewayError, RateLimited, Unavailable

log = logging.getLogger(__name__)

_KIND: Final = "revoked."
_ID_MAX: Final = 200  # characters, as the API takes them
_REST: Final = 0.2  # seconds between two looks at the keys
_SWEEP: Final = 3600.0  # seconds between two looks for keys that are no longer needed

Tell = Callable[[str, float], Awaitable[tuple[int, Sequence[str]]]]
"""Tells the other gateways of a token by id and `exp`, within a second.

Returns how many websockets they closed, and who did not hear it.
"""


@dataclass(frozen=True, slots=True)
class Spread:
    """The reach of a revocation: whether the cluster has it, and which members have not heard of it yet.

    `closed` counts the websockets that those closed which heard it.
    """

    recorded: bool
    unheard: Sequence[str]
    closed: int = 0


class Revoking:
    """The revocations of all gateways.

    `end` ends what is open under a token, by its id, and returns how many websockets that closed; it is
    called for each revocation that comes from elsewhere.
    """

    def __init__(self, local: Revocations, keys: Keys, end: Callable[[str], int], tell: Tell) -> None:
        self._local, self._keys, self._end, self._tell = local, keys, end, tell
        self._look = asyncio.Event()

    def look_soon(self) -> None:
        """Check the keys, which may have changed."""
        self._look.set()

    async def spread(self, token: str) -> Spread:
        """Send a stored revocation to all members. Whatever fails now is done later."""
        expires = self._local.standing().get(token, math.inf)
        told, recorded = await asyncio.gather(self._tell(token, expires), self._record(token, expires))
        closed, unheard = told
        return Spread(recorded, unheard, closed)

    async def heard(self, token: str, expires: float, by: str) -> int:
        """Take a revocation from another gateway; return how many websockets that closed.

        Raises what `Revocations.add` raises.
        """
        if token in self._local:
            return 0
        await self._local.add(token, by, expires)
        return self._end(token)

    async def follow(self) -> None:
        """Keep keys and revocations in agreement, until the cluster cannot be reached.

        Then it raises `Unavailable`.
        """
        while True:
            self._look.clear()
            await self.agree()
            await asyncio.sleep(_REST)  # a burst of changes is looked at together
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP):
                    await self._look.wait()

    async def agree(self) -> None:
        """Adopt what others have written, write what they lack, and remove what has expired."""
        now = time.time()
        listed = await self._keys.listed(_KIND)
        there = set[str]()
        for key, value in listed.items():
            token, expires = _parsed(value)
            if expires < now - KEPT:
                await self._keys.swap(key, value, None)
                continue
            there.add(key)
            if token:
                try:
                    await self.heard(token, expires, "cluster")
                except GatewayError as error:
                    log.warning(
                        "this member still accepts a token that was revoked on another one: %s", error.message
                    )
        for token, expires in self._local.standing().items():
            if expires >= now and _key(token) not in there:
                try:
                    await self._write(token, expires)
                except RateLimited as error:
                    log.warning("cannot tell the cluster of every revoked token: %s", error.message)
                    break

    async def _record(self, token: str, expires: float) -> bool:
        try:
            await self._write(token, expires)
        except GatewayError as error:
            log.warning("the whole cluster does not know of a revocation yet: %s", error.message)
            return False
        return True

    async def _write(self, token: str, expires: float) -> None:
        until = time.time() + MAX_TTL if expires == math.inf else expires
        key, value = _key(token), orjson.dumps({"id": token[:_ID_MAX], "expires": until}).decode()
        if not await self._keys.swap(key, None, value) and await self._keys.get(key) is None:
            raise Unavailable("other members keep changing this revocation; try again", reason="contended")


def _key(token: str) -> str:
    """Return the key of a token; an id may have any letters."""
    return _KIND + hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _parsed(value: str) -> tuple[str, float]:
    """Return the id and `exp` in a value. A malformed value is ignored, and stays."""
    try:
        found: Mapping[str, Any] = orjson.loads(value)
        return str(found["id"]), float(found["expires"])
    except (ValueError, TypeError, KeyError):
        return "", math.inf
