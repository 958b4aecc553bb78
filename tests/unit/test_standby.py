"""When tenants are copied to other members, and which of the copies become tenants again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from gateway.cluster.records import Records, unsure
from gateway.cluster.standby import Standby
from gateway.errors import Conflict, Gone, NotFound, Unavailable
from gateway.idempotency import Idempotency
from gateway.incus import IncusError
from gateway.runtime import TenantInstance
from gateway.runtime.incus.standby_copies import Replica, late_copies
from gateway.settings import Settings
from gateway.storage.store import Store
from tests.waits import until

GiB = 1 << 30


def tenant(name: str, **more: Any) -> TenantInstance:
    return TenantInstance(name, "running", instance=f"id-{name}", location="m1", standby=0.01, **more)


@dataclass
class Copies:
    """The copies of a cluster, as values: `made` are those of our tenants, `there` those of others here."""

    there: list[Replica] = field(default_factory=list)
    sent: tuple[Replica, str] | None = None
    made: list[tuple[str, str]] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    held: list[tuple[str, bool]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    revived: list[str] = field(default_factory=list)
    of: list[str] = field(default_factory=list)  # the snapshots of those
    full: set[str] = field(default_factory=set)  # members
    taken: set[str] = field(default_factory=set)  # names
    stopped: list[str] = field(default_factory=list)  # that ran when the server went down
    silent: bool = False
    half: bool = True  # of the snapshot of `half` only a part is left
    tidied: list[tuple[str, str]] = field(default_factory=list)

    async def here(self) -> list[Replica]:
        if self.silent:
            self.silent = False
            raise Unavailable("no answer")
        return list(self.there)

    async def space(self, member: str) -> tuple[int, int]:
        return 10 * GiB, (10 if member in self.full else 1) * GiB

    async def take(self, tenant: TenantInstance) -> Replica:
        return Replica(tenant.name, tenant.instance or "", "m1", time.time(), True)

    async def send(self, copy: Replica, member: str) -> None:
        if copy.tenant == "unsent":
            raise Unavailable("it broke off")
        if copy.tenant == "half" and (self.half or copy.tenant not in self.gone):
            raise Unavailable("see the log") from IncusError("Failed: No matching subvolume(s)", 400)
        self.sent = copy, member

    async def confirm(self, copy: Replica) -> None:
        assert self.sent is not None and self.sent[0] is copy
        self.made.append((copy.tenant, self.sent[1]))

    async def tidy(self, name: str, keep: str = "") -> None:
        self.tidied.append((name, keep))
        if name == "half" and not keep:
            self.half = False

    async def give_up(self, copy: Replica) -> None:
        self.given_up.append(copy.tenant)

    async def drop(self, name: str) -> None:
        self.gone.append(name)
        self.there = [one for one in self.there if one.tenant != name]

    async def hold_back(self, name: str, *, held: bool) -> None:
        self.held.append((name, held))

    async def forget(self, name: str) -> None:
        self.forgotten.append(name)

    async def fallen(self) -> list[str]:
        return self.stopped

    async def revive(self, copy: Replica) -> None:
        if copy.tenant in self.taken:
            raise Conflict("there is one")
        self.revived.append(copy.tenant)
        self.of.append(copy.snapshot)


@dataclass
class World:
    """What surrounds the copies."""

    store: Store
    state_dir: Path
    copies: Copies = field(default_factory=Copies)
    tenants: list[TenantInstance] = field(default_factory=list)
    peers: dict[str, Any] = field(default_factory=dict)
    members: set[str] = field(default_factory=lambda: {"m1", "m2", "m3"})
    watchers: set[Callable[[], object]] = field(default_factory=set)
    unchanged: set[str] = field(default_factory=set)
    looked: list[str] = field(default_factory=list)  # tenants that were looked at for changes
    told: list[tuple[str, str, Any]] = field(default_factory=list)
    records: dict[tuple[str, str], bytes] = field(default_factory=dict)  # by peer and tenant
    started: list[str] = field(default_factory=list)
    asleep: list[str] = field(default_factory=list)
    full: bool = False  # of memory
    moving: set[str] = field(default_factory=set)
    out: asyncio.Event = field(default_factory=asyncio.Event)
    reported: int = 0  # how often other gateways were told that the lost ones are others
    heard: float | None = None  # when a member was last heard
    here: set[str] = field(default_factory=set)  # tenants that this member has

    def __post_init__(self) -> None:
        for name in ("m2", "m3"):
            self.peers[name] = SimpleNamespace(name=name, alive=True, told=asyncio.Event(), tenants={})
            self.peers[name].told.set()

    async def list(self) -> list[TenantInstance]:
        return self.tenants

    async def start(self, name: str) -> None:
        self.started.append(name)

    def changed(self) -> None:
        self.reported += 1

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        assert asleep
        self.asleep.append(name)

    async def send_records(self, peer: Any, text: bytes, patience: float) -> None:
        self.records[peer.name, orjson.loads(text.splitlines()[0])["tenant"]] = text

    def publish(self, kind: str, name: str, facts: Any) -> None:
        self.told.append((kind, name, facts))

    @contextlib.asynccontextmanager
    async def promise(self, name: str) -> AsyncIterator[None]:
        if self.full:
            raise Unavailable("no room", reason="capacity")
        yield

    def standby(self, **settings: Any) -> Standby:
        async def members() -> set[str]:
            return self.members

        async def changed(name: str, workspace: str, since: str) -> bool:
            assert workspace == Settings().workspace and since.startswith("_gateway-standby-")
            self.looked.append(name)
            if name == "destroyed":
                raise NotFound("no tenant")
            return name not in self.unchanged

        async def nothing() -> None:
            pass

        peers = SimpleNamespace(
            all=self.peers, watchers=self.watchers, removed={}, known=nothing, out=self.out
        )
        peers.present, peers.look, peers.heard = self.peers.keys(), lambda: None, lambda name: self.heard
        names = SimpleNamespace(
            holder=lambda name: f"id-{name}" if name in {*self.here, *self.copies.revived} else ""
        )
        cluster = SimpleNamespace(own="m1", peers=peers, settle=nothing, send_records=self.send_records)
        cluster.changed = self.changed
        world = cast(Any, self)
        return Standby(
            cast(Any, self.copies),
            world,
            cast(Any, cluster),
            members,
            world,
            cast(Any, names),
            Records(self.store, "m1"),
            self.store,
            world,
            Settings(state_dir=self.state_dir, **settings),
            changed=changed,
            moving=self.moving.__contains__,
        )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with Store(tmp_path) as store:
        yield World(store, tmp_path)


@contextlib.asynccontextmanager
async def following(standby: Standby) -> AsyncIterator[None]:
    """Copy, and look for lost tenants, until the end of the block."""
    tasks = [asyncio.create_task(work) for work in (standby.copy(), standby.follow())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ended), ended


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LOOK", "_AGAIN"):
        monkeypatch.setattr(f"gateway.cluster.standby.{name}", 0.01)


async def test_copies_are_spread_and_stay_where_they_are(world: World) -> None:
    world.tenants = [tenant("one"), tenant("two"), tenant("three")]
    standby = world.standby()
    async with following(standby):
        await until(lambda: len(world.copies.made) >= 9)
    first = dict(world.copies.made[:3])
    assert sorted(first.values()) == ["m2", "m2", "m3"]
    assert {(name, member) for name, member in world.copies.made} == set(first.items())
    assert {(member, name) for name, member in first.items()} == world.records.keys()
    shown = standby.of("one")
    assert shown is not None and shown["member"] == first["one"] and shown["of"].startswith("20")
    assert standby.of("none") is None


async def test_the_next_process_knows_where_the_copies_are(world: World) -> None:
    world.tenants = [tenant("one")]
    async with following(world.standby()):
        await until(lambda: world.copies.made)
    ((_, member),) = set(world.copies.made)
    world.tenants = [replace(world.tenants[0], name="zero", instance="id-zero"), *world.tenants]
    world.copies.made.clear()
    async with following(world.standby()):
        await until(lambda: len(world.copies.made) >= 4)
    assert set(world.copies.made) == {("one", member), ("zero", "m3" if member == "m2" else "m2")}


@pytest.mark.parametrize(
    "change",
    [{"standby": 0.0}, {"status": "starting"}, {"deployment": "d1"}, {"migration": "on"}, {"moving": True}],
    ids=["off", "starting", "being deployed", "being migrated", "moving"],
)
async def test_a_tenant_that_is_not_to_be_copied_now_is_not(world: World, change: dict[str, Any]) -> None:
    if change.pop("moving", False):
        world.moving.add("other")
    world.tenants = [replace(tenant("other"), **change), tenant("one")]
    async with following(world.standby()):
        await until(lambda: len(world.copies.made) >= 3)
    assert {name for name, _ in world.copies.made} == {"one"}


async def test_the_setting_counts_where_the_tenant_says_nothing(world: World) -> None:
    world.tenants = [replace(tenant("one"), standby=None), tenant("two")]
    async with following(world.standby(standby=3600)):
        await until(lambda: len(world.copies.made) >= 4)
    assert [name for name, _ in world.copies.made].count("one") == 1


async def test_what_has_not_changed_is_not_copied_again(world: World) -> None:
    world.tenants, world.unchanged = [tenant("one"), tenant("two")], {"one"}
    async with following(world.standby()):
        await until(lambda: world.looked.count("one") >= 3)
    assert [name for name, _ in world.copies.made].count("one") == 1


async def test_what_was_taken_for_a_copy_that_failed_is_given_up(world: World) -> None:
    world.tenants = [tenant("unsent"), tenant("one")]
    standby = world.standby()
    async with following(standby):
        await until(lambda: len(world.copies.made) >= 2 and len(world.copies.given_up) >= 2)
    assert set(world.copies.given_up) == {"unsent"} and standby.of("unsent") is None


async def test_what_is_left_of_a_copy_stops_neither_the_next_one_nor_other_tenants(world: World) -> None:
    """First our snapshots of the tenant go, then, if that was not it, the copy."""
    world.tenants = [tenant("half"), tenant("one")]
    async with following(world.standby()):
        await until(lambda: "half" in dict(world.copies.made))
    assert world.copies.gone == ["half"] and world.copies.given_up == ["half", "half"]
    kept = [keep for name, keep in world.copies.tidied if name == "one"]
    assert kept[0] == "" and all(keep.startswith("_gateway-standby-") for keep in kept[1:])
    assert "one" in dict(world.copies.made)


async def test_a_copy_that_is_late_is_an_alarm(world: World) -> None:
    """In the log, as one event, for doctor, in the metrics and in the tenant; until there is a new one."""
    one = replace(tenant("one"), standby=60.0)
    world.tenants = [one, tenant("unsent")]
    standby = world.standby()
    async with following(standby):
        await until(lambda: late_copies(world.state_dir) == ["unsent"])
        assert set(standby.late) == {"unsent"}
        await until(lambda: len(world.copies.given_up) > 20)
        told = [(kind, name, data) for kind, name, data in world.told if name == "unsent"]
        ((kind, _, data),) = told
        assert (kind, data["member"], data["of"]) == ("tenant.standby.late", None, None)
        world.tenants = [one, replace(tenant("unsent"), standby=0.0)]
        await until(lambda: not late_copies(world.state_dir) and not standby.late)
    shown = standby.of("one")
    assert shown is not None and shown["late"] is False


async def test_a_tenant_is_known_to_have_a_copy_before_it_has_one(world: World) -> None:
    """It goes with the tenant then, also where this process ends in the midst of the copy."""
    world.tenants = [tenant("unsent")]
    async with following(world.standby()):
        await until(lambda: world.copies.given_up)
    world.tenants = []
    async with following(world.standby()):
        await until(lambda: world.copies.gone)
    assert world.copies.gone == ["unsent"]


async def test_incus_leaves_it_to_us_to_start_a_tenant_that_has_a_copy(world: World) -> None:
    world.tenants, world.unchanged = [tenant("one")], {"one"}
    async with following(world.standby()):
        await until(lambda: world.looked.count("one") >= 3)
    assert world.copies.held == [("one", True)]


async def test_what_ran_when_the_server_went_down_is_started_unless_that_was_removed(world: World) -> None:
    world.copies.stopped = ["one"]
    async with following(world.standby()):
        await until(lambda: world.started)
    assert world.started == ["one"]
    world.started.clear()
    world.out.set()
    async with asyncio.timeout(5):
        await world.standby().follow()
    assert not world.started


async def test_a_tenant_that_has_just_been_started_is_not_copied(world: World) -> None:
    """Incus may still be at it, and ends itself where a copy begins meanwhile."""
    world.tenants = [tenant("one"), tenant("two")]
    standby = world.standby()
    for number in range(6):
        world.tenants[0] = replace(world.tenants[0], status="stopped" if number % 2 else "running")
        await standby._copy_all()
        assert "one" not in {name for name, _ in world.copies.made}
    assert "two" in {name for name, _ in world.copies.made}
    await standby._copy_all()
    assert "one" in {name for name, _ in world.copies.made}


async def test_a_tenant_that_is_just_brought_back_is_not_copied(world: World) -> None:
    """The copy would begin while Incus starts it, by which incusd ends."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def start(name: str) -> None:
        begun.set()
        await go_on.wait()

    world.start = start  # type: ignore[method-assign]  # one that takes a while
    world.tenants, world.copies.there = [tenant("lost"), tenant("one")], [copy("lost", "m4")]
    standby = world.standby()
    reviving = asyncio.create_task(standby.recover({"lost"}))
    await begun.wait()
    async with following(standby):
        await until(lambda: len(world.copies.made) >= 3)
        assert {name for name, _ in world.copies.made} == {"one"}
        go_on.set()
        await reviving
        await until(lambda: "lost" in {name for name, _ in world.copies.made})


async def test_a_copy_waits_for_its_member_that_is_away(world: World) -> None:
    """Its name is that member's until it is back; nor does a new one go to who is away."""
    world.tenants = [tenant("one")]
    async with following(world.standby()):
        await until(lambda: world.copies.made)
        ((_, member),) = set(world.copies.made)
        world.peers[member].alive = False
        world.looked.clear()
        await until(lambda: len(world.looked) >= 2)  # one that was begun before is over
        world.copies.made.clear()
        world.looked.clear()
        await until(lambda: len(world.looked) >= 3)
        assert not world.copies.made
        world.tenants.append(tenant("two"))
        await until(lambda: world.copies.made)
        assert {name for name, _ in world.copies.made} == {"two"}
        assert {of for _, of in world.copies.made} == {"m2", "m3"} - {member}


async def test_a_member_without_room_gets_none(world: World) -> None:
    world.tenants, world.copies.full = [tenant("one"), tenant("two")], {"m2"}
    async with following(world.standby()):
        await until(lambda: len(world.copies.made) >= 4)
    assert {member for _, member in world.copies.made} == {"m3"}


async def test_a_copy_ends_with_its_tenant_but_not_where_that_moved(world: World) -> None:
    world.tenants = [tenant("destroyed"), tenant("moved"), tenant("off"), tenant("anew")]
    standby = world.standby()
    async with following(standby):
        await until(lambda: all(standby.of(one.name) for one in world.tenants))
        world.peers["m2"].tenants = {"moved"}
        world.tenants = [
            replace(tenant("off"), standby=0.0),
            replace(tenant("anew"), instance="another", standby=0.0),
        ]
        await until(lambda: not any(map(standby.of, ("destroyed", "moved", "off", "anew"))))
    assert set(world.copies.gone) == {"destroyed", "off", "anew"}
    assert set(world.copies.forgotten) == {"off", "anew"}


async def test_a_copy_that_cannot_be_deleted_now_is_deleted_later_and_holds_up_no_other(world: World) -> None:
    world.tenants = [tenant("gone"), tenant("one")]
    standby = world.standby()
    async with following(standby):
        await until(lambda: standby.of("gone"))
        shown = standby.of("gone")
        assert shown is not None
        world.peers[shown["member"]].alive = False
        world.tenants = [tenant("one"), tenant("two")]
        await until(lambda: standby.of("two"))
        assert not world.copies.gone and standby.of("gone")
        world.peers[shown["member"]].alive = True
        await until(lambda: not standby.of("gone"))
    assert world.copies.gone == ["gone"]


# --- lost members -----------------------------------------------------------------------------------


def copy(name: str, home: str, **more: Any) -> Replica:
    return Replica(name, f"id-{name}", home, time.time() - 100, more.get("running", True))


async def test_tenants_of_a_removed_member_are_lost_until_an_operator_brings_them_back(world: World) -> None:
    """Meanwhile they are refused for now. What is lost counts from when the member was last heard."""
    world.copies.there = [copy("one", "m4"), copy("still", "m4", running=False), copy("theirs", "m3")]
    world.members |= {"m4"}
    world.heard = time.time() - 40  # the copies are 100 s old
    world.peers["m4"] = SimpleNamespace(name="m4", alive=False, told=asyncio.Event())
    standby = world.standby()
    async with following(standby):
        await until(lambda: world.watchers)
        assert await standby.recover({"one", "still"}) == ([], {}), "it may come back with them"
        assert not standby.lost
        del world.peers["m4"]
        world.members.remove("m4")
        for looked in list(world.watchers):
            looked()
        await until(lambda: standby.lost)
        assert {*standby.lost} == {"one", "still"} and world.reported == 1 and not world.copies.revived
        with pytest.raises(Unavailable) as refused:
            standby.check("one")
        assert refused.value.facts["retry_after"] > 0 and refused.value.code == "unavailable"
        standby.check("theirs")
        shown = {one["tenant"]: one for one in await standby.listed()}
        assert [shown[name]["lost"] for name in ("one", "still", "theirs")] == [True, True, False]
        recovered, failed = await standby.recover({"one", "still", "theirs"})
    assert (sorted(one["tenant"] for one in recovered), failed) == (["one", "still"], {})
    assert (sorted(world.copies.revived), world.started) == (["one", "still"], ["one"])
    standby.check("one")
    (kind, name, facts), _ = sorted(world.told)
    assert (kind, name) == ("tenant.recovered", "one")
    assert (facts["from"], facts["to"]) == ("m4", "m1") and 59 <= facts["lostSeconds"] <= 61
    await until(lambda: [one.tenant for one in world.copies.there] == ["theirs"])


async def test_a_look_during_a_recovery_takes_no_tenant_for_lost_that_is_back(world: World) -> None:
    """It may have listed the copy before that was deleted."""
    world.copies.there = [copy("one", "m4")]
    standby = world.standby()
    begun, started, listed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def start(name: str) -> None:
        begun.set()
        await started.wait()

    async def here() -> list[Replica]:
        found = list(world.copies.there)
        await listed.wait()
        return found

    world.start = start  # type: ignore[method-assign]  # one that takes a while
    async with following(standby):
        await until(lambda: standby.lost)
        recovering = asyncio.create_task(standby.recover({"one"}))
        await begun.wait()
        world.copies.here = here  # type: ignore[method-assign]  # one that takes a while
        del world.peers["m3"]
        for looked in list(world.watchers):
            looked()
        for _ in range(10):  # turns of the loop, in which the look begins if it may
            await asyncio.sleep(0)
        started.set()
        await recovering
        reported = world.reported
        listed.set()
        world.peers["m5"] = SimpleNamespace(name="m5", alive=False, told=asyncio.Event())
        for looked in list(world.watchers):
            looked()
        for _ in range(10):
            await asyncio.sleep(0)
        await world.store.settled()
        assert not standby.lost and world.reported == reported


async def test_a_recovery_that_a_process_has_begun_is_finished_by_the_next_one(world: World) -> None:
    world.copies.there, world.copies.silent, world.here = [copy("one", "m4")], True, {"one"}
    async with following(world.standby()):
        await until(lambda: world.told)
        await until(lambda: not world.copies.there)
    assert world.copies.revived == ["one"]


async def test_records_come_back_with_the_disk_that_they_are_of(world: World) -> None:
    """Also of a copy that its home did not live to confirm; of what was done meanwhile nothing is known."""
    idempotency = await Idempotency.opened(world.store, Settings())
    records = Records(world.store, "m4", (idempotency.recall,))
    await idempotency.begin(("one", "call", "before"), b"d")
    await idempotency.finish(("one", "call", "before"), b"d", b"done")
    before = await records.export("one", "id-one", "")
    await idempotency.begin(("one", "call", "meanwhile"), b"d")
    await idempotency.finish(("one", "call", "meanwhile"), b"d", b"done")
    newer = copy("one", "m4")
    await records.keep(unsure(before, await records.export("one", "id-one", newer.snapshot)))
    await idempotency.forget_tenant("one")
    await world.store.settled()
    world.copies.there = [replace(newer, at=newer.at - 60)]
    await world.standby().recover({"one"})
    assert 100 <= world.told[0][2]["lostSeconds"] < 160 and world.copies.of == [newer.snapshot]
    await idempotency.recall("one")
    assert await idempotency.result(("one", "call", "before"), b"d") == b"done"
    with pytest.raises(Gone):
        await idempotency.result(("one", "call", "meanwhile"), b"d")


async def test_one_whose_name_is_taken_leaves_the_others_to_come_back(world: World) -> None:
    world.copies.there, world.copies.taken = [copy("one", "m4"), copy("two", "m4")], {"one"}
    standby = world.standby()
    recovered, failed = await standby.recover({"one", "two"})
    assert [one["tenant"] for one in recovered] == ["two"] and failed == {"one": "there is one"}
    await until(lambda: [one.tenant for one in world.copies.there] == ["one"])
    assert world.copies.revived == ["two"]
    standby.check("one")  # it is the other one now


async def test_what_has_no_room_to_run_waits_for_a_visitor(world: World) -> None:
    world.copies.there, world.full = [copy("one", "m4")], True
    await world.standby().recover({"one"})
    assert (world.started, world.asleep) == ([], ["one"])
