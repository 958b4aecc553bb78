"""No two members have the right to serve one tenant, whoever of them hears whom and whenever."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.cluster.lease import ASK_LEASE, ASK_SILENCE, Lease
from gateway.errors import Unavailable
from gateway.settings import Settings
from tests.shared_memory import MemoryKeys

LEASE = 10.0


class World:
    """Three members with their leases, one clock, and the `links` that are cut."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.keys, self.cut = MemoryKeys(), set[frozenset[str]]()
        self.members = ("m1", "m2", "m3")
        self.leases = {name: self.started(name) for name in self.members}

    def started(self, name: str) -> Lease:
        """Return the lease of a member whose gateway has just been started."""
        others = {other: SimpleNamespace(name=other) for other in self.members if other != name}

        async def ask_all(path: str, body: Any) -> tuple[Mapping[str, Any], list[str]]:
            found, silent = dict[str, Any](), list[str]()
            for other in others:
                if frozenset((name, other)) in self.cut:
                    silent.append(other)
                    continue
                asked = {ASK_LEASE: self.leases[other].hear, ASK_SILENCE: self.leases[other].tell}
                found[other] = await asked[path.rpartition("/")[2]](
                    cast(Any, SimpleNamespace(name=name)), body
                )
            return found, silent

        peers = cast(Any, SimpleNamespace(all=others, ask_all=ask_all))
        return Lease(name, peers, self.keys, LEASE, clock=lambda: self.time)

    def alone(self, name: str) -> None:
        """Cut all that a member has to others."""
        self.cut |= {frozenset((name, other)) for other in self.members if other != name}


@pytest.fixture
async def world() -> World:
    return World()


async def test_most_members_that_hear_it_renew_it_without_the_keys(world: World) -> None:
    own = world.leases["m1"]
    assert not own.held
    assert await own.renew() is None and own.held and own.left == LEASE
    world.keys.quorum = False
    for _ in range(3):
        world.time += LEASE - 1
        assert await own.renew() is None and own.left == LEASE
    world.cut.add(frozenset(("m1", "m2")))  # two of three are most of them
    assert await own.renew() is None and own.left == LEASE


async def test_it_lasts_no_longer_without_most_members_and_a_quorum(world: World) -> None:
    own = world.leases["m1"]
    await own.renew()
    world.alone("m1")
    world.keys.quorum = False
    world.time += LEASE - 0.1
    with pytest.raises(Unavailable):
        await own.renew()
    assert own.held
    world.time += 0.2
    assert not own.held and own.left == 0


async def test_a_quorum_suffices_as_long_as_nobody_suspects_it(world: World) -> None:
    """As where the gateways of the others are stopped, and their Incus is not."""
    own = world.leases["m1"]
    world.alone("m1")
    assert await own.renew() is None and own.held
    world.time += LEASE - 1
    assert await world.leases["m2"].suspect("m1", "s1") == "s1"
    assert await own.renew() == "s1" and own.left == 1
    assert await world.leases["m3"].suspect("m1", "s2") == "s1", "one suspicion stands"
    await own.clear("s1")
    assert await own.renew() is None and own.left == LEASE


async def test_one_that_has_run_out_is_not_given_back_by_others_alone(world: World) -> None:
    """Its tenants may be theirs by then, as only the keys say."""
    own = world.leases["m1"]
    await own.renew()
    world.time += LEASE + 1
    world.keys.quorum = False
    with pytest.raises(Unavailable):
        await own.renew()
    world.keys.quorum = True
    await world.leases["m2"].suspect("m1", "s1")
    assert await own.renew() == "s1" and not own.held


async def test_an_answer_that_comes_late_counts_from_the_question(world: World) -> None:
    own = world.leases["m1"]
    await own.renew()
    hear = world.leases["m2"].hear

    async def slowly(peer: Any, what: Any) -> Mapping[str, Any]:
        world.time += 4
        return await hear(peer, what)

    world.leases["m2"].hear = slowly  # type: ignore[method-assign]  # a peer that is busy
    assert await own.renew() is None and own.left == LEASE - 4


async def test_silence_is_what_most_members_agree_on(world: World) -> None:
    await world.leases["m1"].renew()
    world.time += 30
    world.cut.add(frozenset(("m1", "m2")))
    await world.leases["m1"].renew()  # by m3
    said = await world.leases["m2"].silence("m1")
    assert (said.seconds, said.lease) == (0.0, LEASE), "m3 hears it"
    world.alone("m1")
    world.time += 30
    assert (await world.leases["m2"].silence("m1")).seconds == 30
    world.alone("m2")
    assert (await world.leases["m2"].silence("m1")).seconds == 0, "one of three is not most of them"


async def test_who_has_just_come_up_has_not_heard_it_for_as_long(world: World) -> None:
    """And nobody is taken for dead whose lease nobody knows: it might never freeze its tenants."""
    await world.leases["m1"].renew()
    world.alone("m1")
    world.time += 60
    world.leases["m2"] = world.started("m2")
    world.time += 5
    said = await world.leases["m2"].silence("m1")
    assert (said.seconds, said.lease) == (5, LEASE)
    world.leases["m3"] = world.started("m3")
    world.time += 60
    assert (await world.leases["m2"].silence("m1")).lease is None


async def test_the_longest_lease_that_was_told_counts(world: World) -> None:
    await world.leases["m2"].hear(cast(Any, SimpleNamespace(name="m1")), {"seconds": 30.0})
    await world.leases["m3"].hear(cast(Any, SimpleNamespace(name="m1")), {"seconds": 10.0})
    world.alone("m1")
    assert (await world.leases["m2"].silence("m1")).lease == 30


async def test_a_members_name_may_have_any_letters(world: World) -> None:
    assert await world.leases["m2"].suspect("Server_1", "s1") == "s1"
    assert await world.leases["m3"].suspicion("Server_1") == "s1"
    assert await world.leases["m3"].suspicion("server_1") is None


def test_a_tenant_is_brought_back_no_sooner_than_its_lease_is_over() -> None:
    Settings(failover=0, lease=60)
    Settings(failover=20, lease=15)
    with pytest.raises(ValueError, match="GATEWAY_LEASE"):
        Settings(failover=20, lease=16)
