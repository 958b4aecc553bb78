"""What is open under a token ends with it: by the wall clock, also where that is set, and by a revocation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from gateway.auth import grants as module
from gateway.auth.grants import EXPIRED, REVOKED, Grants
from gateway.auth.tokens import Token
from tests.waits import turn


def token(id: str, expires: float = 1 << 40) -> Token:
    return Token("s", frozenset({"t"}), frozenset({"exec"}), int(expires), id)


class Open:
    """Something that is open, and how it ended."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __call__(self, why: str) -> None:
        self.ended.set_result(why)  # raises where it was said before: once is the rule

    async def why(self) -> str:
        return await asyncio.wait_for(self.ended, 30)


class Clock:
    """The wall clock, as somebody sets it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def time(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
async def grants(clock: Clock) -> AsyncIterator[Grants]:
    grants = Grants(lambda id: id == "taken back")
    watching = asyncio.create_task(grants.watch())
    yield grants
    watching.cancel()


async def test_the_first_to_end_is_ended_first(grants: Grants) -> None:
    """Also where it came last, while a later end was waited for."""
    late, soon = Open(), Open()
    grants.hold(token("a"), late)
    await turn()
    ends = int(time.time()) + 1
    grants.hold(token("b", ends), soon)
    assert await soon.why() == EXPIRED
    assert ends <= time.time() < ends + 1
    assert not late.ended.done()


async def test_a_clock_that_is_set_is_noticed(grants: Grants, clock: Clock) -> None:
    one = Open()
    grants.hold(token("a", time.time() + 3600), one)
    await turn()
    clock.ahead, began = 3601, time.monotonic()
    assert await one.why() == EXPIRED
    assert time.monotonic() - began < 30  # not an hour


async def test_what_has_ended_by_now_is_ended_at_once(grants: Grants) -> None:
    """The token was good when it was looked at; something was waited for since."""
    old, taken = Open(), Open()
    grants.hold(token("a", time.time() - 1), old)
    grants.hold(token("taken back"), taken)
    assert (old.ended.result(), taken.ended.result()) == (EXPIRED, REVOKED)


async def test_a_revocation_ends_what_is_of_that_token_alone(grants: Grants) -> None:
    first, second, other, closed = Open(), Open(), Open(), Open()
    for open_ in (first, second):
        grants.hold(token("a"), open_)
    grants.hold(token("b"), other)
    with grants.hold(token("a"), closed):
        pass
    grants.revoke("a")
    assert (first.ended.result(), second.ended.result()) == (REVOKED, REVOKED)
    assert not other.ended.done() and not closed.ended.done()


async def test_a_renewed_one_goes_by_its_new_token(grants: Grants, clock: Clock) -> None:
    one = Open()
    grant = grants.hold(token("a", time.time() + 60), one)
    grant.renew(token("b", time.time() + 7200))
    grants.revoke("a")
    clock.ahead = 3600
    # whatever ends later than it would have, by its first token, shows that it was left open
    other = Open()
    grants.hold(token("c", time.time() + 3601), other)
    clock.ahead = 3602
    assert await other.why() == EXPIRED
    assert not one.ended.done()
    grants.revoke("b")
    assert one.ended.result() == REVOKED


async def test_one_that_cannot_be_ended_keeps_no_other_open(grants: Grants) -> None:
    def fails(why: str) -> None:
        raise RuntimeError

    other = Open()
    grants.hold(token("a", time.time() + 1), fails)
    grants.hold(token("b", time.time() + 1), other)
    assert await other.why() == EXPIRED
