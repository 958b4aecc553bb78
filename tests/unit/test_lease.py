"""When a member has the right to serve tenants of which others have copies."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.cluster.lease import Lease
from gateway.errors import Unavailable
from tests.shared_memory import MemoryKeys


class World:
    """The two peers of m1: what they answer, and the time."""

    def __init__(self) -> None:
        self.time = 100.0
        self.answers: dict[str, Any] = {}
        self.keys = MemoryKeys()
        peers = SimpleNamespace(all={"m2": None, "m3": None}, ask_all=self.ask_all)
        self.lease = Lease("m1", cast(Any, peers), self.keys, 10.0, clock=lambda: self.time)

    async def ask_all(self, path: str, body: Any) -> tuple[Mapping[str, Any], list[str]]:
        return self.answers, []

    def hear(self, *, suspected: bool = False) -> None:
        self.answers = {"m2": {"suspected": suspected}}


@pytest.fixture
async def world() -> World:
    return World()


async def test_only_the_keys_give_it_at_first_and_back(world: World) -> None:
    """Its tenants may be another member's by then, whoever hears it now."""
    world.hear()
    world.keys.quorum = False
    with pytest.raises(Unavailable):
        await world.lease.renew()
    assert not world.lease.held
    world.keys.quorum = True
    assert await world.lease.renew() is None
    assert world.lease.held and world.lease.left == 10.0
    world.time += 10.0
    assert not world.lease.held
    world.keys.quorum = False
    with pytest.raises(Unavailable):
        await world.lease.renew()
    assert not world.lease.held


async def test_while_it_lasts_most_members_renew_it(world: World) -> None:
    await world.lease.renew()
    world.keys.quorum = False
    world.hear()
    for _ in range(3):
        world.time += 9.0
        await world.lease.renew()
        assert world.lease.left == 10.0
    world.answers = {}  # it hears itself alone
    world.time += 9.0
    with pytest.raises(Unavailable):
        await world.lease.renew()
    assert world.lease.left == 1.0


async def test_a_suspicion_of_which_a_peer_tells_is_looked_up(world: World) -> None:
    """And ends the renewals, though most members hear it."""
    await world.lease.renew()
    world.keys.values["lost.m1"] = "s1"
    world.time += 5.0
    world.hear(suspected=True)
    assert await world.lease.renew() == "s1"
    assert world.lease.left == 5.0
    await world.lease.clear("s1")
    assert await world.lease.renew() is None
    assert world.lease.left == 10.0


async def test_it_is_counted_from_when_it_was_asked_for(world: World) -> None:
    async def slowly(path: str, body: Any = None, patience: float = 0.0) -> tuple[dict[str, Any], list[str]]:
        world.time += 4.0
        return {}, []

    world.lease._peers.ask_all = slowly  # type: ignore[method-assign]
    await world.lease.renew()
    assert world.lease.left == 6.0
