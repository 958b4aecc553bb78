"""Whichever gateways are asked for a new tenant at once, all choose one home for it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from gateway.cluster import placements
from gateway.cluster.placements import Placements
from gateway.errors import RateLimited, Unavailable
from tests.shared_memory import MemoryKeys


class Cluster:
    def __init__(self) -> None:
        self.keys, self.members = MemoryKeys(), {"m1", "m2", "m3"}
        self.placements = self.kept(3600)

    def kept(self, seconds: float) -> Placements:
        async def members() -> Collection[str]:
            return self.members

        return Placements(self.keys, members, seconds)


@pytest.fixture
async def cluster() -> Cluster:
    return Cluster()


async def test_of_two_hundred_requests_at_once_all_have_one_home(cluster: Cluster) -> None:
    members = sorted(cluster.members)
    for number in range(5):
        asked = (cluster.placements.choose(f"t{number}", members[turn % 3]) for turn in range(200))
        assert len(set(await asyncio.gather(*asked))) == 1


async def test_a_choice_stands_for_its_time_and_for_its_member(cluster: Cluster) -> None:
    assert await cluster.placements.choose("shop", "m1") == "m1"
    assert await cluster.placements.choose("shop", "m2") == "m1"
    cluster.members.discard("m1")
    assert await cluster.placements.choose("shop", "m2") == "m2"
    brief = cluster.kept(-1)
    assert await brief.choose("other", "m2") == "m2"
    assert await brief.choose("other", "m3") == "m3"


async def test_only_who_was_chosen_takes_it_back(cluster: Cluster) -> None:
    await cluster.placements.choose("shop", "m1")
    await cluster.placements.forget("shop", "m2")
    assert await cluster.placements.choose("shop", "m2") == "m1"
    await cluster.placements.forget("shop", "m1")
    assert await cluster.placements.choose("shop", "m2") == "m2"


async def test_expired_choices_leave_no_keys(cluster: Cluster) -> None:
    brief = cluster.kept(-1)
    for number in range(30):
        await brief.choose(f"t{number}", "m1")
    assert len(cluster.keys.values) <= 2


async def test_there_are_not_more_than_so_many(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placements, "_MOST", 3)
    for number in range(3):
        await cluster.placements.choose(f"t{number}", "m1")
    with pytest.raises(RateLimited):
        await cluster.placements.choose("t3", "m1")
    assert await cluster.placements.choose("t0", "m2") == "m1"


async def test_without_a_quorum_none_is_chosen(cluster: Cluster) -> None:
    cluster.keys.quorum = False
    with pytest.raises(Unavailable):
        await cluster.placements.choose("shop", "m1")


async def test_who_asks_first_has_a_tenant_whose_home_is_taken_for_lost(cluster: Cluster) -> None:
    after = cluster.placements.after
    assert await after("back", "m1", "m1", "s1") == "m1"
    assert await after("back", "m1", "m2", "s1") == "m1", "it kept it"
    assert await after("back", "m1", "m2", "s2") == "m2", "but it is lost another time"
    assert await after("gone", "m1", "m2", "s1") == "m2"
    assert await after("gone", "m1", "m1", "s1") == "m2", "it is another one's by now"
    assert await cluster.placements.taken("m2") == {"back", "gone"}
    assert await cluster.placements.taken("m1") == set()


async def test_one_that_was_brought_back_stays_where_it_is_whatever_its_former_homes_were_told(
    cluster: Cluster,
) -> None:
    after = cluster.placements.after
    assert await after("shop", "m1", "m2", "s1") == "m2"
    assert await after("shop", "m2", "m3", "s2") == "m3"
    assert await after("shop", "m1", "m1", "s1") == "m3"
    await cluster.placements.move("shop", "m2", "a-move")
    assert await after("shop", "m1", "m1", "s1") == "m2"
    assert await after("shop", "m3", "m1", "s3") == "m2", "a copy that is older than the move is none"
    cluster.members.discard("m2")
    assert await after("shop", "m1", "m1", "s1") == "m1", "nobody comes back with it"


async def test_a_decision_about_a_lost_home_goes_like_any_other_once_that_is_back(cluster: Cluster) -> None:
    await cluster.placements.after("shop", "m1", "m2", "s1")
    await cluster.placements.back("shop", "m2", "s1")
    assert await cluster.placements.taken("m2") == set()
    assert await cluster.placements.choose("shop", "m3") == "m2"


async def test_without_a_quorum_nobody_takes_a_tenant(cluster: Cluster) -> None:
    cluster.keys.quorum = False
    with pytest.raises(Unavailable):
        await cluster.placements.after("shop", "m1", "m2", "s1")


async def test_a_lost_home_does_not_come_back_with_a_tenant_that_has_moved_since(cluster: Cluster) -> None:
    """However long it was away: a move's decision alone would be gone after an hour."""
    brief = cluster.kept(-1)  # what may go has gone
    await brief.after("shop", "m1", "m2", "s1")
    await brief.move("shop", "m3", "a-move")
    await brief.settle("shop", "m3", "a-move")
    await brief.choose("other", "m2")  # which removes what has gone
    assert await brief.after("shop", "m1", "m1", "s1") == "m3"
    await brief.back("shop", "m3", "s1")
    assert await brief.decided("shop", "a-move"), "its old home may still ask"
    await brief.settle("shop", "m3", "a-move")
    assert await brief.choose("shop", "m2") == "m2"


async def test_what_is_told_of_one_loss_says_nothing_of_another(cluster: Cluster) -> None:
    await cluster.placements.after("shop", "m1", "m2", "s1")
    await cluster.placements.after("shop", "m2", "m3", "s2")
    await cluster.placements.back("shop", "m3", "s1")
    assert await cluster.placements.taken("m3") == {"shop"}
