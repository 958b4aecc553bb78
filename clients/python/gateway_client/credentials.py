"""The client's token: its source, when to renew it, and what happens if that fails."""

from __future__ import annotations

import asyncio
import base64
import inspect
import logging
import random
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Final, TypeAlias

import orjson

from gateway_client.errors import TokenUnavailable

log = logging.getLogger(__name__)

Token: TypeAlias = str | Callable[[], str | Awaitable[str]]
"""A token, or a function, asynchronous or not, that returns one."""

# seconds before its end at which a token is renewed, at most; of a short one this share of its life
MARGIN: Final = 60.0
SHARE: Final = 0.1
# seconds that the function may take
TIMEOUT: Final = 30.0
# seconds after a failure of the function: the first, and the longest
FIRST, LONGEST = 0.5, 15.0
# seconds of apparent difference to the gateway's clock, which has whole seconds only
SAME: Final = 5.0


class Credentials:
    """A client's token, and the function that returns the next. `renewed` is called with each new one.

    A function that is not asynchronous is called in a thread, since it may block.
    """

    def __init__(self, token: Token, renewed: Callable[[], None]) -> None:
        self._supply = None if isinstance(token, str) else token
        self._renewed = renewed
        self._ahead = 0.0  # seconds of the gateway's clock before ours
        self._failures, self._again = 0, 0.0
        self._asking: asyncio.Task[str] | None = None
        # files and stores of secrets add a line's end, which no header can hold
        self.token = token.strip() if isinstance(token, str) else None
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("this is no token: it has characters that none has")
        self._expires = self._due = float("inf")

    @property
    def renewable(self) -> bool:
        """Whether there may be another token after the present one."""
        return self._supply is not None

    @property
    def pause(self) -> float:
        """Seconds until the next token is due."""
        return max(self._due - self._now(), self._again - time.monotonic(), 0.0)

    async def current(self) -> str:
        """Return a token that has not ended, as far as is known. Raises `TokenUnavailable`.

        A token that ends soon is still returned, while the next one is requested.
        """
        if self.token is None or (self._supply is not None and self._now() >= self._expires):
            return await self.next()
        if self._supply is not None and self.pause == 0:
            self._ask()
        return self.token

    async def next(self) -> str:
        """Request a token, once for all waiting callers. Raises `TokenUnavailable`."""
        return await asyncio.shield(self._ask())

    async def after(self, refused: str) -> str | None:
        """Return another token than one that the gateway refused, None if there is none."""
        if self._supply is None:
            return None
        if self.token != refused:  # it was renewed meanwhile
            return self.token
        token = await self.next()
        return None if token == refused else token

    def learn(self, token: str, expires: object, date: str | None) -> None:
        """Take the gateway's word on a token's end and on the time."""
        other = self.renewable and date is not None and self._set_clock(date)
        if token != self.token or not isinstance(expires, int | float):
            return
        if other or expires != self._expires:
            self._plan(float(expires))

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    def _now(self) -> float:
        return time.time() + self._ahead

    def _set_clock(self, date: str) -> bool:
        """Take the gateway's time; return whether its clock differs from the one assumed."""
        try:
            ahead = parsedate_to_datetime(date).timestamp() - time.time()
        except ValueError:
            return False
        before, self._ahead = self._ahead, ahead if abs(ahead) > SAME else 0.0
        return abs(before - self._ahead) > SAME

    def _plan(self, expires: float) -> None:
        self._expires = expires
        margin = min(MARGIN, max(0.0, expires - self._now()) * SHARE)
        # so that many clients do not ask at the same moment; no secret depends on it
        self._due = expires - margin * random.uniform(1.0, 2.0)  # noqa: S311

    def _ask(self) -> asyncio.Task[str]:
        if self._asking is None:
            self._asking = asyncio.create_task(self._asked(), name="token")
            self._asking.add_done_callback(_seen)
        return self._asking

    async def _asked(self) -> str:
        try:
            token = await self._supplied()
        except TokenUnavailable as error:
            log.warning("%s", error.message)
            self._wait()
            raise
        finally:
            self._asking = None
        if token == self.token:  # it has none newer yet
            self._wait()
            return token
        self._failures, self._again = 0, 0.0
        self.token = token
        self._expires = self._due = float("inf")
        if (expires := _expires(token)) is not None:
            self._plan(expires)
        self._renewed()
        return token

    def _wait(self) -> None:
        pause = min(LONGEST, FIRST * 2.0 ** min(self._failures, 16))
        self._failures += 1
        self._again = time.monotonic() + pause * random.uniform(0.5, 1.0)  # noqa: S311 - as above

    async def _supplied(self) -> str:
        supply = self._supply
        assert supply is not None
        waits = inspect.iscoroutinefunction(supply) or inspect.iscoroutinefunction(
            getattr(supply, "__call__", None)  # noqa: B004 - an object may be called too
        )
        deadline = asyncio.timeout(TIMEOUT)
        try:
            async with deadline:
                token = supply() if waits else await asyncio.to_thread(supply)
                if inspect.isawaitable(token):
                    token = await token
        except Exception as error:
            why = f"failed: {type(error).__name__}: {error}"
            if deadline.expired():
                why = f"took more than {TIMEOUT:.0f} s"
            raise TokenUnavailable(f"the function that gives the token {why}") from error
        found = token.strip() if isinstance(token, str) else ""
        if not found or not found.isascii() or not found.isprintable():  # it goes into a header
            what = "text that is not one" if isinstance(token, str) else type(token).__name__
            raise TokenUnavailable(f"the function that gives the token returned no token, but {what}")
        return found


def _seen(task: asyncio.Task[str]) -> None:
    if not task.cancelled():
        task.exception()  # logged; the next caller that needs the token gets the error


def _expires(token: str) -> float | None:
    """Return the end of a token as it says itself, None if it cannot be read."""
    try:
        part = token.split(".")[1]
        claims = orjson.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        return float(claims["exp"])
    except (IndexError, ValueError, KeyError, TypeError):
        return None
