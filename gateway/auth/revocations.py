"""Tokens that are revoked before their `exp`."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Mapping
from typing import Final

from gateway.errors import RateLimited
from gateway.storage.store import Store

# ids of about a hundred bytes each; to revoke more, change the secret
MOST: Final = 100_000
# seconds that an id is kept after its token's `exp`: clocks differ
KEPT: Final = 3600.0


class Revocations:
    """The ids of revoked tokens, in memory and in the store. Create it with `opened`.

    Those whose tokens have expired by themselves are forgotten, where that is known.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._revoked: dict[str, float] = {}  # when each token expires, in seconds since the epoch

    @classmethod
    async def opened(cls, store: Store) -> Revocations:
        self = cls(store)
        for token, expires in await store.read(_all):
            self._revoked[token] = math.inf if expires is None else expires
        if min(self._revoked.values(), default=math.inf) < time.time() - KEPT:
            await self._forget_expired()
        return self

    def __contains__(self, token: str) -> bool:
        return token in self._revoked

    def standing(self) -> Mapping[str, float]:
        """Return the ids, and when each token expires; `inf` where that is not known."""
        return dict(self._revoked)

    async def add(self, token: str, by: str, expires: float = math.inf) -> None:
        """Revoke the token with this `jti`. It is refused from now on, even after a power cut.

        `expires` is when it expires by itself. Raises `RateLimited` if there are too many, and `StoreFailed`:
        then it is not revoked.
        """
        if token in self._revoked:
            return
        if len(self._revoked) >= MOST:
            await self._forget_expired()
        if len(self._revoked) >= MOST:
            raise RateLimited(
                f"{MOST} tokens are revoked, which is the limit; change the secret to revoke all tokens"
            )
        at = time.time()
        until = None if expires == math.inf else expires
        await self._store.write(lambda connection: _insert(connection, token, at, by, until), durable=True)
        self._revoked[token] = expires

    async def _forget_expired(self) -> None:
        before = time.time() - KEPT
        await self._store.write(lambda connection: _delete_expired(connection, before))
        self._revoked = {token: expires for token, expires in self._revoked.items() if expires >= before}


def _all(connection: sqlite3.Connection) -> list[tuple[str, float | None]]:
    return connection.execute("SELECT token, expires FROM revoked").fetchall()


def _insert(connection: sqlite3.Connection, token: str, at: float, by: str, expires: float | None) -> None:
    connection.execute(
        "INSERT OR IGNORE INTO revoked (token, at, who, expires) VALUES (?, ?, ?, ?)",
        (token, at, by, expires),
    )


def _delete_expired(connection: sqlite3.Connection, before: float) -> None:
    connection.execute("DELETE FROM revoked WHERE expires < ?", (before,))
