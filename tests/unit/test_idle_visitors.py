"""Visitors of one sleeping site, who need no token, take no place from those of others."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from gateway.errors import RateLimited
from gateway.lifecycle.idle import Idle
from gateway.lifecycle.lifecycle import SiteRoutes
from gateway.settings import Settings
from tests.waits import turn


class Asleep:
    """A Caddy whose sites all sleep, and domains whose owner is not found out."""

    tenants = usage = None

    def get(self, domain: str) -> str:
        return domain

    def sleeps(self, domain: str) -> bool:
        return True

    async def released(self, domain: str) -> None:
        return

    async def owner(self, domain: str) -> str | None:
        await asyncio.Event().wait()
        return None


async def test_visitors_of_one_site_are_half_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.lifecycle.idle.VISITORS", 4)
    asleep = cast(Any, Asleep())
    idle = Idle(asleep, SiteRoutes(asleep, asleep, asleep, asleep), asleep, asleep, Settings())
    waiting = [asyncio.ensure_future(idle.visit("greedy.example.com")) for _ in range(2)]
    await turn()
    for _ in range(2):
        with pytest.raises(RateLimited) as caught:
            await idle.visit("greedy.example.com")
        assert caught.value.facts["retry_after"] > 0
    waiting += [asyncio.ensure_future(idle.visit(f"site{n}.example.com")) for n in range(2)]
    await turn()
    assert not any(one.done() for one in waiting)
    with pytest.raises(RateLimited):
        await idle.visit("another.example.com")
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    late = asyncio.ensure_future(idle.visit("greedy.example.com"))
    await turn()
    assert not late.done()
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)
