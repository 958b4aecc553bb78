"""Ends what is open under a token when the token ends: at its `exp`, or when it is revoked.

Whatever outlasts its request holds a `Grant` meanwhile: a websocket, an event stream, a followed log. Other
requests need none; see docs/protocol.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from gateway.auth.tokens import Token

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
