"""Ends what is open under a token when the token ends: at its `exp`, or when it is revoked.

Whatever outlasts its request holds a `Grant` meanwhile: a websocket, an event stream, a followed log. Other
requests need none; see docs/protocol.md. `Revocations` are the tokens that were revoked before their `exp`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

from gateway.auth.tokens import Token
from gateway.errors import RateLimited
from gateway.storage.store import Store

log = logging.getLogger(__name__)

EXPIRED: Final = "this token has expired; ask for a new one"
REVOKED: Final = "this token was revoked"

# seconds between checks while anything is open: `exp` is wall-clock time, and that clock may be set
_LOOK: Final = 0.5

End = Callable[[str], None]


class Grant:
    """One open thing and its token. Use it in a `with`, or end it with `close`."""

    def __init__(self, grants: Grants, token: Token, end: End) -> None:
        self.token = token
        self._grants, self._end = grants, end

    def __enter__(self) -> Grant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def renew(self, token: Token) -> None:
        """Use another token from now on; the end of the previous one has no effect any more."""
        self.token = token
        self._grants._look_at(self)

    def close(self) -> None:
        """Forget it, since it is no longer open. Idempotent."""
        self._grants._open.discard(self)


class Grants:
    """Everything that is open. `revoked` returns whether the token with an id is revoked."""

    def __init__(self, revoked: Callable[[str], bool]) -> None:
        self._revoked = revoked
        self._open: set[Grant] = set()
        self._changed = asyncio.Event()

    def hold(self, token: Token, end: End) -> Grant:
        """Call `end` once, with the reason in words, when the token ends; at once if it has ended already.

        So no end is missed between the check of a token and this call.
        """
        grant = Grant(self, token, end)
        self._open.add(grant)
        self._look_at(grant)
        return grant

    def revoke(self, token: str) -> None:
        """End everything open under the token with this id."""
        for grant in [grant for grant in self._open if grant.token.id == token]:
            _end(grant, REVOKED)

    async def watch(self) -> None:
        """End everything whose token expires. Runs forever."""
        while True:
            self._changed.clear()
            now = time.time()
            for grant in [grant for grant in self._open if grant.token.expires <= now]:
                _end(grant, EXPIRED)
            soonest = min((grant.token.expires for grant in self._open), default=None)
            pause = None if soonest is None else min(_LOOK, max(0.0, soonest - time.time()))
            try:
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def ended(self, token: Token) -> str | None:
        """Return in words why a token has ended since it was verified, or None."""
        if self._revoked(token.id):
            return REVOKED
        return EXPIRED if token.expires <= time.time() else None

    def _look_at(self, grant: Grant) -> None:
        if ended := self.ended(grant.token):
            _end(grant, ended)
        elif len(self._open) == 1 or grant.token.expires <= time.time() + _LOOK:
            self._changed.set()  # otherwise the next check is soon enough


def _end(grant: Grant, why: str) -> None:
    grant.close()
    try:
        grant._end(why)
    except Exception:  # the others must still end
        log.exception("cannot close what a token had opened")


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
