"""Every tenant has a share of the tool sessions with a name, and what is in use makes no place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gateway.errors import RateLimited
from gateway.tools.call import Seen
from gateway.tools.session import Sessions, ToolSession
from tests.waits import turn


class Commands:
    """What runs in the background of sessions, as far as sessions ask."""

    def __init__(self) -> None:
        self.running = set[ToolSession]()
        self.ended = list[ToolSession]()

    def busy(self, session: ToolSession) -> bool:
        return session in self.running

    async def end(self, session: ToolSession) -> None:
        self.ended.append(session)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.tools.session.TENANT_SESSIONS", 2)


def sessions() -> tuple[Sessions, Commands]:
    commands = Commands()
    return Sessions(commands), commands


@contextmanager
def refused(limit: int) -> Iterator[None]:
    with pytest.raises(RateLimited) as caught:
        yield
    assert caught.value.facts["limit"] == limit
    assert caught.value.facts["retry_after"] > 0


async def test_a_tenants_own_idle_session_makes_place() -> None:
    """The one that was used longest ago, with what it left running; another tenant's never."""
    opened, commands = sessions()
    other = opened.open("other", "a", False)
    first, second = opened.open("greedy", "1", False), opened.open("greedy", "2", False)
    assert opened.open("greedy", "1", False) is first
    opened.open("greedy", "3", False)
    await turn()
    assert commands.ended == [second]
    assert opened.open("greedy", "1", False) is first
    assert opened.open("greedy", "2", False) is not second
    assert opened.open("other", "a", False) is other


async def test_a_session_in_use_makes_no_place() -> None:
    """Neither an open connection's nor one with a command in the background, until those are over."""
    opened, commands = sessions()
    held = opened.open("greedy", "held", False, lasting=True)
    busy = opened.open("greedy", "busy", False)
    commands.running.add(busy)
    with refused(2):
        opened.open("greedy", "more", False)
    assert opened.open("greedy", "held", False) is held
    opened.open("other", "a", False)
    commands.running.clear()
    opened.open("greedy", "more", False)
    await turn()
    assert commands.ended == [busy]
    await opened.leave(held)
    opened.open("greedy", "and more", False)


async def test_whoever_has_most_makes_place_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.tools.session.TENANT_SESSIONS", 3)
    monkeypatch.setattr("gateway.tools.session.SESSIONS", 4)
    opened, commands = sessions()
    greedy = [opened.open("greedy", str(number), False) for number in range(3)]
    modest = opened.open("modest", "a", False)
    newcomer = opened.open("newcomer", "a", False)
    await turn()
    assert commands.ended == greedy[:1]
    assert opened.open("modest", "a", False) is modest
    assert opened.open("newcomer", "a", False) is newcomer


async def test_what_a_session_remembers_is_bounded() -> None:
    session = ToolSession(kept_bytes=10_000)
    seen = Seen.__new__(Seen)
    for number in range(100):
        session.remember(f"{number:04000}", seen)
    kept = [number for number in range(100) if session.seen(f"{number:04000}") is seen]
    assert kept == [98, 99]
