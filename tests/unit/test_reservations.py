"""Names that one member has in the whole cluster, over keys in memory."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import Unavailable
from gateway.ownership.reservations import Holder, Reservations
from tests.shared_memory import MemoryKeys

SHOP = "shop.example.com"


class Rig:
    """Three members over the same keys."""

    def __init__(self) -> None:
        self.keys = MemoryKeys()
        self.members = {"m1", "m2", "m3"}
        self.m1, self.m2 = self.of("m1"), self.of("m2")

    def of(self, member: str) -> Reservations:
        async def members() -> set[str]:
            return self.members

        return Reservations(self.keys, "domain", member, members)


@pytest.fixture
async def rig() -> Rig:
    return Rig()


async def test_of_all_members_at_once_one_has_a_name(rig: Rig) -> None:
    views = [rig.of(member) for member in sorted(rig.members)]
    for number in range(20):
        name = f"s{number}.example.com"
        turns = views[number % 3 :] + views[: number % 3]
        won = await asyncio.gather(*(view.take(name, f"t-{view.own}") for view in turns))
        assert won.count(True) == 1
        owner = turns[won.index(True)].own
        assert (await rig.m1.held())[name] == Holder(owner, f"t-{owner}")


async def test_what_a_member_has_it_may_take_again_and_for_another_tenant(rig: Rig) -> None:
    assert await rig.m1.take(SHOP, "shop")
    swaps = rig.keys.swaps
    assert await rig.m1.take(SHOP, "shop")
    assert rig.keys.swaps == swaps, "what is so already costs no change"
    assert await rig.m1.take(SHOP, "other")
    assert await rig.m1.held() == {SHOP: Holder("m1", "other")}


async def test_only_its_member_leaves_a_name(rig: Rig) -> None:
    assert await rig.m1.take(SHOP, "shop")
    await rig.m2.leave(SHOP)
    assert not await rig.m2.take(SHOP, "shop")
    await rig.m1.leave(SHOP)
    await rig.m1.leave(SHOP)
    assert await rig.m2.take(SHOP, "other")


async def test_a_tenant_that_has_moved_keeps_its_names(rig: Rig) -> None:
    """One that is only being made under that name somewhere has not."""
    assert await rig.m1.take(SHOP, "shop")
    assert not await rig.m2.take(SHOP, "shop")
    assert not await rig.m2.take(SHOP, "other", here=True)
    assert await rig.m2.take(SHOP, "shop", here=True)
    assert not await rig.m1.take(SHOP, "shop")


async def test_what_a_member_has_is_free_once_it_is_no_member(rig: Rig) -> None:
    assert await rig.m1.take(SHOP, "shop")
    rig.members.discard("m1")
    assert await rig.m2.take(SHOP, "other")


async def test_a_value_that_somebody_spoilt_is_nobodys(rig: Rig) -> None:
    rig.keys.values[f"domain.{SHOP}"] = "scribble"
    assert await rig.m1.held() == {}
    assert await rig.m1.take(SHOP, "shop")


async def test_names_of_another_kind_are_others(rig: Rig) -> None:
    other = Reservations(rig.keys, "home", "m2", rig.of("m2")._members)
    assert await rig.m1.take(SHOP, "shop")
    assert await other.take(SHOP, "shop")
    assert await other.held() == {SHOP: Holder("m2", "shop")}


async def test_without_a_quorum_nothing_is_taken(rig: Rig) -> None:
    rig.keys.quorum = False
    with pytest.raises(Unavailable):
        await rig.m1.take(SHOP, "shop")
    with pytest.raises(Unavailable):
        await rig.m1.leave(SHOP)
