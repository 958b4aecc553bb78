"""A tenant of a member that is gone comes back at another one, and never runs at both."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.cluster.lease import Lease
from gateway.cluster.placements import Placements
from gateway.errors import Unavailable
from gateway.lifecycle.takeover import Return, Takeover
from gateway.runtime.incus.standby_copies import StandbyCopy
from gateway.settings import Settings
from tests.shared_memory import MemoryKeys
from tests.waits import until

SETTINGS = Settings(failover=20, lease=10)
FREEZING = 1.5  # seconds from the end of a lease until its tenants stand still
MEMBERS = ("m1", "m2", "m3")
STEP = 0.5
AWAY = 3.0


class Keys(MemoryKeys):
    """The keys as a member sees them: with a quorum, if it is connected to another one."""

    def __init__(self, world: World, member: str) -> None:
        super().__init__()
        self.values, self._world, self._member = world.values, world, member

    async def _asked(self) -> None:
        self.quorum = self._world.reaches(self._member)
        await super()._asked()


class Server:
    """One member: what it knows, and which tenants run there."""

    def __init__(self, world: World, name: str) -> None:
        self.name, self.world = name, world
        self.peers = {other: Peer(world, name, other) for other in MEMBERS if other != name}
        keys = Keys(world, name)
        asking = cast(Any, SimpleNamespace(all=self.peers, ask_all=self.ask_all))
        self.lease = Lease(name, asking, keys, SETTINGS.lease, clock=lambda: world.time)
        self.placements = Placements(keys, self.members, 3600)
        cluster = SimpleNamespace(own=name, peers=asking, alive=lambda other: self.peers[other].alive)
        own = cast(Any, self)
        self.takeover = Takeover(
            cast(Any, cluster), self.lease, self.placements, own, own, self.answers, self.statuses, SETTINGS
        )
        names = cast(Any, SimpleNamespace(moving=set(), leave=self.left))
        records = cast(Any, SimpleNamespace(leave=self.left))
        self.returning = Return(
            *(name, self.placements, own, own, own, names, records, own, set(), lambda tenant: None),
            state_dir=world.folder / name,
        )
        self.tenants, self.copied = set[str](), set[str]()
        self.copies = list[StandbyCopy]()
        self.frozen = self.fallen_ = False
        self.ended = float("-inf")  # its lease

    async def members(self) -> Collection[str]:
        return MEMBERS

    async def ask_all(self, path: str, body: Any) -> tuple[Mapping[str, Any], list[str]]:
        found, silent = dict[str, Any](), list[str]()
        for other in self.peers:
            if self.world.heard(self.name, other):
                question = self.world.servers[other].lease.questions[path.rpartition("/")[2]]
                found[other] = await question(cast(Any, SimpleNamespace(name=self.name)), body)
            else:
                silent.append(other)
        return found, silent

    async def answers(self, address: str) -> bool:
        return self.world.linked(self.name, address)

    async def statuses(self) -> Mapping[str, str]:
        """As the member that leads sees them, which is one that most others reach."""
        if not self.world.reaches(self.name):
            raise Unavailable("no quorum")
        leader = self.world.leader
        return {
            other: "Online"
            if other in {leader, *self.world.online} or self.world.linked(leader, other)
            else "Offline"
            for other in MEMBERS
        }

    async def here(self) -> list[StandbyCopy]:
        return list(self.copies)

    async def held(self) -> Mapping[str, str]:
        return {}

    async def revive(self, copy: StandbyCopy, *, away: bool) -> None:
        assert away
        if self.world.failing:
            self.world.failing -= 1
            raise Unavailable("it is busy")
        home = self.world.servers[copy.home]
        self.world.check(home, copy.tenant)
        self.tenants.add(copy.tenant)
        self.copies.remove(copy)

    def instance(self, tenant: str) -> str:
        return f"id-{tenant}"

    async def give_up(self, tenant: str, instance: str, move: str) -> None:
        assert instance == f"id-{tenant}" and len(move) == 16
        if tenant in self.world.stuck:
            raise Unavailable("an operation of Incus failed; see the gateway's log")
        self.tenants.remove(tenant)

    async def gone(self, tenant: str) -> None:
        self.copied.remove(tenant)

    async def left(self, tenant: str) -> None:
        pass

    async def step(self) -> None:
        """Do what the jobs of its gateway do each while."""
        had = self.lease.held
        try:
            suspicion = await self.lease.renew()
            if suspicion is not None:
                await self.returning.accused(suspicion)
                await self.lease.clear(suspicion)
                await self.lease.renew()
        except Unavailable:
            pass
        if had and not self.lease.held:
            self.ended = self.world.time
        self.frozen = not self.lease.held and self.world.time > self.ended + FREEZING


class Peer:
    """Another member as one sees it: away once it said nothing for three seconds."""

    def __init__(self, world: World, own: str, name: str) -> None:
        self._world, self._own, self.name, self.incus = world, own, name, name
        self.heard = world.time

    @property
    def alive(self) -> bool:
        if self._world.heard(self._own, self.name):
            self.heard = self._world.time
        return self._world.time < self.heard + AWAY


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.stuck = folder, set[str]()  # tenants of which something cannot be deleted
        for name in MEMBERS:
            (folder / name).mkdir()
        self.time, self.values = 1000.0, dict[str, str]()
        self.cut, self.dead, self.failing = set[frozenset[str]](), set[str](), 0
        self.deaf = set[frozenset[str]]()  # links of which the gateways make nothing, and Incus does
        self.leader = "m3"
        self.online = set[str]()  # members of which Incus says that they are, whoever reaches them
        self.servers = {name: Server(self, name) for name in MEMBERS}
        for tenant, member in (("shop", "m2"), ("blog", "m3")):
            self.servers["m1"].tenants.add(tenant)
            self.servers["m1"].copied.add(tenant)
            self.servers[member].copies.append(StandbyCopy(tenant, f"id-{tenant}", "m1", 0.0, True))

    def linked(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.cut and not {one, other} & self.dead

    def heard(self, one: str, other: str) -> bool:
        return self.linked(one, other) and frozenset((one, other)) not in self.deaf

    def reaches(self, name: str) -> bool:
        return name not in self.dead and any(self.linked(name, other) for other in MEMBERS if other != name)

    def alone(self, name: str) -> None:
        self.cut |= {frozenset((name, other)) for other in MEMBERS if other != name}

    def check(self, home: Server, tenant: str) -> None:
        """Hold that a tenant does not run at its home when it begins to elsewhere."""
        if home.name not in self.dead and tenant in home.tenants:
            assert not home.lease.held and home.frozen, f"{tenant} runs at {home.name} at {self.time}"

    async def run(self, seconds: float) -> None:
        until = self.time + seconds
        while self.time < until:
            for server in self.servers.values():
                if server.name not in self.dead:
                    await server.step()
            for server in self.servers.values():
                if server.name not in self.dead:
                    await server.takeover.look()
            self.hold()
            self.time += STEP

    def hold(self) -> None:
        """Hold that no tenant runs twice."""
        for tenant in ("shop", "blog"):
            runs = [
                server.name
                for server in self.servers.values()
                if tenant in server.tenants
                and server.name not in self.dead
                and not server.frozen
                # which the fence leaves frozen
                and tenant not in server.returning.left
            ]
            assert len(runs) <= 1, f"{tenant} runs at {runs} at {self.time}"


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    world = World(tmp_path)
    monkeypatch.setattr("gateway.lifecycle.takeover.now", lambda: world.time)
    return world


async def test_tenants_of_a_member_that_dies_come_back_where_their_copies_are(world: World) -> None:
    await world.run(5)
    world.dead.add("m1")
    died = world.time
    while "shop" not in world.servers["m2"].tenants or "blog" not in world.servers["m3"].tenants:
        await world.run(STEP)
        assert world.time < died + 25
    assert world.time >= died + SETTINGS.failover - SETTINGS.lease / 5
    world.dead.clear()
    world.servers["m1"].lease = Server(world, "m1").lease  # it has just come up
    await world.run(20)
    assert not world.servers["m1"].tenants and not world.servers["m1"].copied
    assert not [key for key in world.values if key.startswith("lost.")]


async def test_what_cannot_be_deleted_yet_does_not_stop_a_member_that_returns(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other tenants do not wait; that one stays frozen there, for the next process too, until it goes."""
    await world.run(5)
    world.dead.add("m1")
    await world.run(30)
    assert world.servers["m2"].tenants == {"shop"} and world.servers["m3"].tenants == {"blog"}
    old = world.servers["m1"]
    old.tenants.add("own")
    old.copied.add("own")
    world.stuck = {"shop"}
    world.dead.clear()
    old.lease = Server(world, "m1").lease  # it has just come up
    await world.run(20)
    assert old.lease.held and old.tenants == {"own", "shop"} and set(old.returning.left) == {"shop"}
    assert set(Server(world, "m1").returning.left) == {"shop"}
    monkeypatch.setattr("gateway.lifecycle.takeover._LEFT", 0.01)
    following = asyncio.create_task(old.returning.follow())
    world.stuck = set()
    await until(lambda: not old.returning.left)
    following.cancel()
    assert old.tenants == {"own"} and not Server(world, "m1").returning.left


async def test_a_member_that_comes_back_in_time_keeps_its_tenants(world: World) -> None:
    await world.run(5)
    world.alone("m1")
    await world.run(15)
    assert world.servers["m1"].frozen and [key for key in world.values if key.startswith("lost.")]
    world.cut.clear()
    await world.run(60)
    assert world.servers["m1"].tenants == {"shop", "blog"} and not world.servers["m1"].frozen
    assert not [key for key in world.values if key.startswith("lost.")]


async def test_a_member_whose_lease_nobody_knows_is_waited_for(world: World) -> None:
    """It may be of a version, or have settings, that do not freeze anything."""
    world.alone("m1")
    await world.run(120)
    assert world.servers["m1"].tenants == {"shop", "blog"}


async def test_a_member_that_another_one_still_hears_is_not_taken_for_dead(world: World) -> None:
    await world.run(5)
    world.cut.add(frozenset(("m1", "m2")))
    for world.leader in MEMBERS:
        await world.run(60)
    assert world.servers["m1"].tenants == {"shop", "blog"} and not world.servers["m1"].frozen


async def test_a_member_that_incus_has_not_given_up_is_not_taken_for_dead(world: World) -> None:
    """Though nobody hears it, and nothing at its address answers."""
    await world.run(5)
    world.dead.add("m1")
    world.online.add("m1")
    await world.run(60)
    assert not world.servers["m2"].tenants
    world.online.clear()
    await world.run(5)
    assert world.servers["m2"].tenants == {"shop"}


async def test_what_was_decided_is_done_also_when_the_old_home_is_back(world: World) -> None:
    await world.run(5)
    world.dead.add("m1")
    world.failing = 5
    while not any("lost-" in value for key, value in world.values.items() if key.startswith("home.")):
        await world.run(STEP)
    world.dead.clear()
    await world.run(30)
    everywhere = [tenant for server in world.servers.values() for tenant in server.tenants]
    assert sorted(everywhere) == ["blog", "shop"]


async def test_a_lease_of_the_keys_alone_is_waited_for(world: World) -> None:
    """Its gateway is not heard any more, but has just been told that nobody suspects it."""
    await world.run(5)
    world.deaf = {frozenset(("m1", "m2")), frozenset(("m1", "m3"))}
    await world.run(60)
    assert world.servers["m1"].tenants == {"shop", "blog"} and world.servers["m1"].lease.held
    world.alone("m1")
    await world.run(8)
    assert world.servers["m1"].tenants == {"shop", "blog"} and not world.servers["m2"].tenants
    await world.run(20)
    assert world.servers["m2"].tenants == {"shop"}


@pytest.mark.parametrize("seed", range(40))
async def test_no_tenant_runs_twice_whichever_links_break_and_heal(world: World, seed: int) -> None:
    chance = random.Random(seed)
    await world.run(5)
    links = [frozenset(pair) for pair in (("m1", "m2"), ("m1", "m3"), ("m2", "m3"))]
    for _ in range(12):
        world.cut = {link for link in links if chance.random() < 0.5}
        world.deaf = {link for link in links if chance.random() < 0.3}
        world.leader = chance.choice(MEMBERS)
        world.failing = chance.choice((0, 0, 3))
        await world.run(chance.choice((2, 8, 14, 21, 35)))
    world.cut.clear()
    world.deaf.clear()
    await world.run(40)
    everywhere = [tenant for server in world.servers.values() for tenant in server.tenants]
    assert sorted(everywhere) == ["blog", "shop"]
