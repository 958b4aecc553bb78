"""Tokens that were revoked before their `exp`."""

from __future__ import annotations

import sqlite3
import time
from typing import Final

from gateway.errors import RateLimited
from gateway.storage.store import Store

# only ids, some hundred bytes each; to revoke more, change the secret
MOST: Final = 100_000


class Revocations:
    """The ids of revoked tokens, in memory and in the store. Make it by `opened`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._revoked: set[str] = set()

    @classmethod
    async def opened(cls, store: Store) -> Revocations:
        self = cls(store)
        self._revoked = await store.read(_all)
        return self

    def __contains__(self, token: str) -> bool:
        return token in self._revoked

    async def add(self, token: str, by: str) -> None:
        """Take back the token with this `jti`. It is refused from now on, also after a power cut.

        Raises `RateLimited` if there are too many, and `StoreFailed`: then it is not revoked.
        """
        if token in self._revoked:
            return
        if len(self._revoked) >= MOST:
            raise RateLimited(
                f"{MOST} tokens are revoked, which is the limit; change the secret to revoke all tokens"
            )
        at = time.time()
        await self._store.write(lambda connection: _insert(connection, token, at, by), durable=True)
        self._revoked.add(token)


def _all(connection: sqlite3.Connection) -> set[str]:
    return {token for (token,) in connection.execute("SELECT token FROM revoked")}


def _insert(connection: sqlite3.Connection, token: str, at: float, by: str) -> None:
    connection.execute("INSERT OR IGNORE INTO revoked VALUES (?, ?, ?)", (token, at, by))
