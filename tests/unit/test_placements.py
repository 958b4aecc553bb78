"""Whichever gateways are asked for a new tenant at once, all choose one home for it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from gateway.cluster.keys import Placements
from gateway.errors import RateLimited, Unavailable
from tests.shared_memory import MemoryKeys


class Cluster:
    def __init__(self) -> None:
        self.keys, self.members = MemoryKeys(), {"m1", "m2", "m3"}
        self.placements = self._placements()

    def _placements(self) -> Placements:
        async def members() -> Collection[str]:
            return self.members

        return Placements(self.keys, members)


@pytest.fixture
async def cluster() -> Cluster:
    return Cluster()


async def test_of_two_hundred_requests_at_once_all_have_one_home(cluster: Cluster) -> None:
    members = sorted(cluster.members)
    for number in range(5):
        asked = (cluster.placements.choose(f"t{number}", members[turn % 3]) for turn in range(200))
        assert len(set(await asyncio.gather(*asked))) == 1


async def test_a_choice_stands_for_its_time_and_for_its_member(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await cluster.placements.choose("shop", "m1") == "m1"
    assert await cluster.placements.choose("shop", "m2") == "m1"
    cluster.members.discard("m1")
    assert await cluster.placements.choose("shop", "m2") == "m2"
    monkeypatch.setattr("gateway.cluster.keys.HOME_KEPT", -1)
    assert await cluster.placements.choose("other", "m2") == "m2"
    assert await cluster.placements.choose("other", "m3") == "m3"


async def test_only_who_was_chosen_takes_it_back(cluster: Cluster) -> None:
    await cluster.placements.choose("shop", "m1")
    await cluster.placements.forget("shop", "m2")
    assert await cluster.placements.choose("shop", "m2") == "m1"
    await cluster.placements.forget("shop", "m1")
    assert await cluster.placements.choose("shop", "m2") == "m2"


async def test_expired_choices_leave_no_keys(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cluster.keys.HOME_KEPT", -1)
    for number in range(30):
        await cluster.placements.choose(f"t{number}", "m1")
    assert len(cluster.keys.values) <= 2


async def test_there_are_not_more_than_so_many(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cluster.keys._PLACED_MOST", 3)
    for number in range(3):
        await cluster.placements.choose(f"t{number}", "m1")
    with pytest.raises(RateLimited):
        await cluster.placements.choose("t3", "m1")
    assert await cluster.placements.choose("t0", "m2") == "m1"


async def test_without_a_quorum_none_is_chosen(cluster: Cluster) -> None:
    cluster.keys.quorum = False
    with pytest.raises(Unavailable):
        await cluster.placements.choose("shop", "m1")
