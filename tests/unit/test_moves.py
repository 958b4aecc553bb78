"""A tenant moves to another member: whole or not at all, once, whatever breaks off and whoever is killed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.cluster import cluster as clusters
from gateway.cluster import moves, peers
from gateway.cluster.cluster import PUT_RECORDS, Cluster
from gateway.cluster.keys import Placements
from gateway.cluster.moves import Arrivals, Departures, Move, MoveLog, Mover, Uses
from gateway.cluster.peers import Known
from gateway.cluster.records import Records
from gateway.errors import Conflict, InvalidParams, NotFound, Unavailable
from gateway.events import Bus, Filter, StoredJournal
from gateway.idempotency import Idempotency
from gateway.lifecycle.doors import Doors
from gateway.ownership.names import Names
from gateway.runtime import OnAnotherServer, TenantInstance
from gateway.settings import Settings
from gateway.storage.store import Store
from tests.shared_memory import MemoryKeys
from tests.unit.test_cluster_common import members
from tests.waits import pause, until

SHOP = "shop"


class Incus:
    """What all members see: instances by name, with their member, and what was done, in order."""

    def __init__(self) -> None:
        self.instances: dict[str, dict[str, Any]] = {
            SHOP: {"member": "m1", "uuid": "i-1", "tenant": True, "running": True, "disk": 0}
        }
        self.done: list[str] = []
        self.fails: dict[str, int] = {}  # how often a step fails before it succeeds
        self.reached: dict[str, asyncio.Event] = {}
        self.held: dict[str, asyncio.Event] = {}

    async def do(self, step: str) -> None:
        self.reached.setdefault(step, asyncio.Event()).set()
        if (held := self.held.get(step)) is not None:
            await held.wait()
        if self.fails.get(step, 0) > 0:
            self.fails[step] -= 1
            raise Unavailable(f"{step} fails", reason="test")
        await asyncio.sleep(0)
        self.done.append(step)

    def home(self) -> tuple[str, bool]:
        """Return where the only tenant is, and whether it runs."""
        (found,) = [one for one in self.instances.values() if one["tenant"]]
        assert self.instances[SHOP] is found
        return found["member"], found["running"]


class Runtime:
    """One member's tenants, and its steps of a move."""

    def __init__(self, member: str, incus: Incus) -> None:
        self.member, self._incus = member, incus

    def _find(self, name: str) -> dict[str, Any]:
        found = self._incus.instances.get(name)
        if found is None or not found["tenant"]:
            raise NotFound(f"no tenant {name}")
        if found["member"] != self.member:
            raise OnAnotherServer(name, found["member"])
        return found

    async def list(self) -> list[TenantInstance]:
        here = [name for name, one in self._incus.instances.items() if one["member"] == self.member]
        return [await self.get(name) for name in here if self._incus.instances[name]["tenant"]]

    async def get(self, name: str) -> TenantInstance:
        found = self._find(name)
        return TenantInstance(name, "running" if found["running"] else "stopped", instance=found["uuid"])

    async def start(self, name: str) -> None:
        await self._incus.do("start")
        self._find(name)["running"] = True

    async def stop(self, name: str) -> None:
        await self._incus.do("stop")
        self._find(name)["running"] = False

    # at the old home

    async def managed(self, tenant: str) -> str | None:
        return None

    async def snapshot(self, tenant: str, number: int) -> None:
        await self._incus.do("snapshot")
        self._find(tenant).setdefault("snapshots", []).append(number)

    async def forget_snapshots(self, tenant: str, but: int | None = None) -> None:
        found = self._find(tenant)
        found["snapshots"] = [one for one in found.get("snapshots", ()) if one == but]

    async def put_aside(self, tenant: str, instance: str, move: str) -> None:
        await self._incus.do("put_aside")
        if f"Moved-{move}" in self._incus.instances:
            return
        found = self._find(tenant)
        assert found["uuid"] == instance and not found["running"]
        del self._incus.instances[tenant]
        self._incus.instances[f"Moved-{move}"] = found | {"tenant": False}

    async def bring_back(self, tenant: str, instance: str, move: str, managed: str | None) -> None:
        await self._incus.do("bring back")
        if (aside := self._incus.instances.pop(f"Moved-{move}", None)) is not None:
            self._incus.instances[tenant] = aside | {"tenant": True}

    async def discard_old(self, move: str) -> None:
        await self._incus.do("discard_old")
        self._incus.instances.pop(f"Moved-{move}", None)

    # at the new one

    async def copy(self, tenant: str, instance: str, move: str, *, last: bool = False) -> None:
        await self._incus.do("last copy" if last else "copy")
        found = self._incus.instances[tenant]
        assert found["uuid"] == instance and (not last or not found["running"])
        copied = {"member": self.member, "uuid": instance, "tenant": False, "running": False}
        self._incus.instances[f"Moving-{move}"] = copied | {"disk": found["disk"]}

    async def take_over(self, tenant: str, instance: str, move: str, managed: str | None) -> None:
        await self._incus.do("take over")
        if (copied := self._incus.instances.pop(f"Moving-{move}", None)) is not None:
            assert tenant not in self._incus.instances
            self._incus.instances[tenant] = copied
        self._incus.instances[tenant]["tenant"] = True

    async def discard_copy(self, move: str) -> None:
        await self._incus.do("discard copy")
        self._incus.instances.pop(f"Moving-{move}", None)


class Home:
    """The parts of one member's gateway that a move has to do with."""

    def __init__(self, folder: Path, cluster: Cluster, incus: Incus, keys: MemoryKeys) -> None:
        self._folder, self.cluster, self.incus = folder / cluster.own, cluster, incus
        self.settings = Settings(state_dir=self._folder)

        self.known = ["m1", "m2"]

        async def known() -> list[str]:
            return self.known

        self.placements = Placements(keys, known)
        self.deploying = False
        self.parted: list[str] = []

    @contextlib.asynccontextmanager
    async def life(self) -> AsyncIterator[Home]:
        """Be one process of the gateway."""
        incus, settings, cluster = self.incus, self.settings, self.cluster
        self.runtime, self.leaving = Runtime(cluster.own, incus), set[str]()
        async with (
            Store(self._folder) as store,
            StoredJournal(store, kept=1000, kept_bytes=1 << 20, age=3600) as journal,
        ):
            self.bus = Bus(journal, cluster.own)
            self.idempotency = await Idempotency.opened(store, settings)
            self.names = await Names.opened(store, self.bus, settings)
            self.records = Records(store, cluster.own, (self.idempotency.recall,))
            self.doors, log = Doors(), MoveLog(store)
            for tenant in await self.runtime.list():
                await self.names.arrive(tenant.name, tenant.instance or "", 0.0)
            runtime, other = cast(Any, self.runtime), cast(Any, _Others(incus))

            def changed(_: str) -> None:
                cluster.changed()

            arrivals = Arrivals(
                cluster.own,
                runtime,
                steps=runtime,
                records=self.records,
                names=self.names,
                log_=log,
                bus=self.bus,
                room=other,
                capacity=other,
                changed=changed,
            )

            def deploying(_: str) -> bool:
                return self.deploying

            uses = Uses(doors=self.doors, part=self.parted.append, execs=other, files=other, workers=other)
            moves = Mover(
                *(cluster, self.placements, runtime, runtime, uses, self.leaving),
                *(self.records, self.names, log, self.bus, settings, deploying),
            )
            self.departures = Departures(
                cluster, runtime, moves, other, log, self.bus, settings, deploying, changed
            )
            await self.departures.recover()

            async def tenants() -> list[Known]:
                return [Known(one.name, instance=one.instance) for one in await self.runtime.list()]

            async def has(what: Any) -> bool:
                return False

            async def keep(_: Any, text: bytes) -> Any:
                return {"id": (await self.records.keep(text)).id}

            async def app(*_: Any) -> None:
                raise AssertionError("nothing is passed on")

            async with cluster.open(
                *(app, store, tenants, has, {}, {}), arrivals.orders(), {PUT_RECORDS: keep}
            ):
                await self.departures.resume()
                try:
                    yield self
                finally:
                    await self.departures.close()

    async def moved(self, move: Move, state: str) -> Move:
        """Return the move once it has ended so."""
        found: list[Move] = []

        async def over() -> bool:
            last = await self.departures.last(SHOP)
            found[:] = [] if last is None else [last]
            return last is not None and last.id == move.id and last.over and not self.departures.moving(SHOP)

        await until(over, 30)
        assert found[0].state == state, found[0]
        return found[0]

    async def told(self) -> list[str]:
        """Return the types of the tenant's events here."""
        subscription = self.bus.subscribe(Filter(), 0)
        self.bus.publish("end")
        found = list[str]()
        async for event in subscription:
            if event.type == "end":
                return found
            if event.tenant == SHOP:
                found.append(event.type)
        return found


class _Others:
    """Rooms that a move only tells of itself."""

    def __init__(self, incus: Incus) -> None:
        self._incus = incus

    def alone(self, tenant: str) -> Any:
        return contextlib.nullcontext()

    def promise(self, tenant: str, memory: str | None) -> Any:
        return contextlib.nullcontext()

    async def admit(self) -> None:
        await self._incus.do("admit")

    async def lose(self, tenant: str, cause: str, seconds: float) -> None:
        await self._incus.do(f"commands end: {cause}")

    async def forget(self, tenant: str, why: str = "") -> None:
        pass


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two find each other without the pauses that many members need."""
    monkeypatch.setattr(clusters, "SETTLING", 0.05)
    monkeypatch.setattr(moves, "CALLS", 0.05)
    monkeypatch.setattr(peers, "_SOON", 0.02)
    monkeypatch.setattr(moves, "_PAUSES", (0.02, 0.2))


@pytest.fixture
def incus() -> Incus:
    return Incus()


@pytest.fixture
def keys() -> MemoryKeys:
    return MemoryKeys()


@pytest.fixture
async def homes(tmp_path: Path, incus: Incus, keys: MemoryKeys) -> AsyncIterator[tuple[Home, Home]]:
    """The two homes, of which none runs yet."""
    async with members(tmp_path, "m1", "m2") as clusters:
        old, new = (Home(tmp_path, cluster, incus, keys) for cluster in clusters)
        yield old, new


@contextlib.asynccontextmanager
async def both(homes: tuple[Home, Home]) -> AsyncIterator[tuple[Home, Home]]:
    old, new = homes
    async with old.life(), new.life():
        await until(
            lambda: all(peer.told.is_set() for home in homes for peer in home.cluster.peers.all.values())
        )
        yield old, new


async def _call(home: Home, number: str) -> bytes | None:
    """Make a call once; return what an earlier one left."""
    key: Any = (SHOP, "call", number)
    if (known := await home.idempotency.result(key, b"d")) is not None:
        return known
    await home.idempotency.begin(key, b"d")
    await home.idempotency.finish(key, b"d", f"by {home.cluster.own}".encode())
    return None


_ORDER = ("commands end: moved", "streams end", "stop", "last copy")


async def test_a_tenant_runs_at_its_new_home_with_its_records(homes: tuple[Home, Home], incus: Incus) -> None:
    async with both(homes) as (old, new):
        await _call(old, "c1")
        move = await old.departures.begin(SHOP, "m2", "me")
        assert (move.state, (await old.departures.begin(SHOP, "m2", "me")).id) == ("waiting", move.id)
        with old.doors.stream(SHOP, lambda: incus.done.append("streams end")):
            ended = await old.moved(move, "moved")
        assert ended.gap is not None and ended.error is None
        assert incus.home() == ("m2", True)
        assert await _call(new, "c1") == b"by m1"
        assert await _call(old, "c1") is None  # nothing of it is left
        assert (old.names.holder(SHOP), new.names.holder(SHOP)) == ("", "i-1")
        assert not old.doors.closed(SHOP) and old.leaving == set() and old.parted == [SHOP]
        order = [incus.done.index(what) for what in _ORDER]
        assert order == sorted(order)
        await until(lambda: list(incus.instances) == [SHOP])
        assert await old.told() == ["tenant.moving"] and await new.told() == ["tenant.moved"]
        last = await new.departures.last(SHOP)
        assert last is not None and (last.id, last.state) == (move.id, "moved")


async def test_lists_have_it_at_each_moment(homes: tuple[Home, Home], incus: Incus) -> None:
    """Also while no instance has its name, and of members that were asked before and after it has come."""
    incus.held["take over"] = asyncio.Event()
    async with both(homes) as (old, new):
        assert old.departures.listed() == []
        move = await old.departures.begin(SHOP, "m2", "me")
        await until(lambda: "take over" in incus.reached)
        assert await old.runtime.list() == await new.runtime.list() == []
        (listed,) = old.departures.listed()
        assert (listed.name, listed.status, listed.location) == (SHOP, "running", "m2")
        incus.held["take over"].set()
        await old.moved(move, "moved")
        assert old.departures.listed() == [listed]
        del incus.instances[SHOP]  # it is destroyed there
        new.cluster.changed()
        await until(lambda: old.departures.listed() == [])


async def test_one_that_stays_is_listed_by_its_runtime_alone(homes: tuple[Home, Home], incus: Incus) -> None:
    incus.fails["last copy"] = 1
    async with both(homes) as (old, _):
        await old.moved(await old.departures.begin(SHOP, "m2", "me"), "failed")
        assert old.departures.listed() == []


async def test_a_stopped_tenant_stays_stopped(homes: tuple[Home, Home], incus: Incus) -> None:
    incus.instances[SHOP]["running"] = False
    async with both(homes) as (old, _):
        await old.moved(await old.departures.begin(SHOP, "m2", "me"), "moved")
        assert incus.home() == ("m2", False) and "start" not in incus.done


async def test_a_tenant_comes_back_later(homes: tuple[Home, Home], incus: Incus) -> None:
    async with both(homes) as (old, new):
        await _call(old, "c1")
        await old.moved(await old.departures.begin(SHOP, "m2", "me"), "moved")
        await new.moved(await new.departures.begin(SHOP, "m1", "me"), "moved")
        assert incus.home() == ("m1", True) and await _call(old, "c1") == b"by m1"
        assert (old.names.holder(SHOP), new.names.holder(SHOP)) == ("i-1", "")


async def test_calls_wait_while_it_is_stopped_and_no_longer(homes: tuple[Home, Home], incus: Incus) -> None:
    incus.held["last copy"] = asyncio.Event()
    async with both(homes) as (old, _):
        move = await old.departures.begin(SHOP, "m2", "me")
        await until(lambda: "last copy" in incus.reached)
        waiting = asyncio.create_task(old.doors.wait(SHOP))
        await asyncio.sleep(0)
        assert not waiting.done() and SHOP in old.leaving
        incus.held["last copy"].set()
        await waiting
        assert incus.home() == ("m2", True) and old.names.holder(SHOP) == ""
        await old.moved(move, "moved")


@pytest.mark.parametrize("step", ["admit", "snapshot", "copy", "commands end: moved", "stop", "last copy"])
async def test_what_fails_before_the_decision_leaves_it_where_it_was(
    homes: tuple[Home, Home], incus: Incus, step: str
) -> None:
    incus.fails[step] = 1
    async with both(homes) as (old, new):
        await _call(old, "c1")
        ended = await old.moved(await old.departures.begin(SHOP, "m2", "me"), "failed")
        assert ended.error is not None and ended.error["reason"] == "test"
        assert incus.home() == ("m1", True)
        assert not old.doors.closed(SHOP) and old.leaving == set()
        assert await _call(old, "c1") == b"by m1" and old.names.holder(SHOP) == "i-1"

        async def tidied() -> bool:
            return list(incus.instances) == [SHOP] and await new.records.kept(SHOP) is None

        await until(tidied)
        assert incus.instances[SHOP].get("snapshots", []) == []
        assert await old.told() == ["tenant.moving", "tenant.move.failed"] and await new.told() == []
        # and it can be moved then
        await old.moved(await old.departures.begin(SHOP, "m2", "me"), "moved")
        assert incus.home() == ("m2", True)


async def test_records_that_are_on_their_way_as_a_move_fails_are_not_left_at_the_other_home(
    homes: tuple[Home, Home], incus: Incus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is told to drop them only once they are there."""
    incus.fails["last copy"] = 1
    async with both(homes) as (old, new):
        send, sent = old.cluster.send_records, asyncio.Event()

        async def late(*given: Any) -> None:
            await until(lambda: incus.fails["last copy"] == 0)
            await pause(0.3)
            await send(*given)
            sent.set()

        monkeypatch.setattr(old.cluster, "send_records", late)
        ended = await old.moved(await old.departures.begin(SHOP, "m2", "me"), "failed")
        assert ended.error is not None and ended.error["reason"] == "test"
        async with asyncio.timeout(30):
            await sent.wait()

        async def dropped() -> bool:
            return await new.records.kept(SHOP) is None

        await until(dropped, 10)


@pytest.mark.parametrize("step", ["put_aside", "take over", "start"])
async def test_what_fails_after_the_decision_is_done_again(
    homes: tuple[Home, Home], incus: Incus, step: str
) -> None:
    incus.fails[step] = 2
    async with both(homes) as (old, new):
        await _call(old, "c1")
        ended = await old.moved(await old.departures.begin(SHOP, "m2", "me"), "moved")
        assert ended.error is None and incus.home() == ("m2", True)
        assert await _call(new, "c1") == b"by m1"
        assert await new.told() == ["tenant.moved"]


STEPS = {
    "admit": "m1",
    "copy": "m1",
    "commands end: moved": "m1",
    "stop": "m1",
    "last copy": "m1",
    "put_aside": "m2",
    "take over": "m2",
    "start": "m2",
    "discard_old": "m2",
}


@pytest.mark.parametrize("step", STEPS)
async def test_a_killed_gateway_undoes_or_finishes_it(
    homes: tuple[Home, Home], incus: Incus, step: str
) -> None:
    """The old home's, in the middle of each step."""
    old, new = homes
    incus.held[step] = asyncio.Event()
    async with new.life():
        async with old.life():
            await until(lambda: all(peer.told.is_set() for peer in old.cluster.peers.all.values()))
            await _call(old, "c1")
            move = await old.departures.begin(SHOP, "m2", "me")
            await until(lambda: step in incus.reached)
        incus.held.pop(step).set()
        async with old.life():
            home = STEPS[step]
            await old.moved(move, "failed" if home == "m1" else "moved")
            assert incus.home() == (home, True)
            await until(lambda: list(incus.instances) == [SHOP])
            owner, other = (old, new) if home == "m1" else (new, old)
            assert (owner.names.holder(SHOP), other.names.holder(SHOP)) == ("i-1", "")
            assert await _call(owner, "c1") == b"by m1"
            assert not old.doors.closed(SHOP) and old.leaving == set()


async def test_without_a_quorum_nothing_is_decided_and_nothing_runs_twice(
    homes: tuple[Home, Home], incus: Incus, keys: MemoryKeys
) -> None:
    """It is not known whether it was decided: so nobody has the tenant until that is known."""
    incus.held["last copy"] = asyncio.Event()
    async with both(homes) as (old, _):
        move = await old.departures.begin(SHOP, "m2", "me")
        await until(lambda: "last copy" in incus.reached)
        keys.quorum = False
        incus.held["last copy"].set()
        await until(lambda: old.departures._moves[SHOP].error is not None)
        assert incus.home() == ("m1", False) and old.doors.closed(SHOP)
        keys.quorum = True
        await old.moved(move, "failed")
        assert incus.home() == ("m1", True)


async def test_a_new_home_that_is_lost_for_good_gives_the_tenant_back(
    homes: tuple[Home, Home], incus: Incus
) -> None:
    """After the decision, but before the tenant was there: its member was removed by force."""
    incus.fails["take over"] = 1_000_000
    async with both(homes) as (old, _):
        await _call(old, "c1")
        move = await old.departures.begin(SHOP, "m2", "me")
        await until(lambda: "take over" in incus.reached and SHOP not in incus.instances)
        old.known = ["m1"]
        ended = await old.moved(move, "failed")
        assert ended.error is not None and incus.home() == ("m1", True)
        assert await _call(old, "c1") == b"by m1" and old.names.holder(SHOP) == "i-1"


async def test_a_move_that_makes_no_sense_is_refused_at_once(homes: tuple[Home, Home], incus: Incus) -> None:
    async with both(homes) as (old, _):
        for member in ("m1", "m9"):
            with pytest.raises(InvalidParams):
                await old.departures.begin(SHOP, member, "me")
        with pytest.raises(NotFound):
            await old.departures.begin("nobody", "m2", "me")
        old.deploying = True
        with pytest.raises(Conflict):
            await old.departures.begin(SHOP, "m2", "me")
        assert incus.done == [] and await old.told() == []


async def test_no_tenant_goes_to_a_gateway_that_knows_no_moves(
    homes: tuple[Home, Home], incus: Incus
) -> None:
    async with both(homes) as (old, _):
        peer = old.cluster.peers.all["m2"]
        for facts in ({"v": 1}, {}):
            peer.facts = facts
            with pytest.raises(Unavailable) as refused:
                await old.departures.begin(SHOP, "m2", "me")
            assert refused.value.facts["reason"] == "older"
        peer.facts = {"v": 99, "colour": "red"}
        await old.moved(await old.departures.begin(SHOP, "m2", "me"), "moved")
        assert incus.home() == ("m2", True)


async def test_events_of_the_old_home_are_no_position_at_the_new_one(homes: tuple[Home, Home]) -> None:
    """Nor is a number alone; one of the new home goes on there."""
    async with both(homes) as (old, new):
        last = old.bus.last
        await old.moved(await old.departures.begin(SHOP, "m2", "me"), "moved")
        assert new.names.position(SHOP, last + 1_000_000) == 0
        here = new.bus.last
        assert new.names.position(SHOP, f"m2:{here}") == here
        assert new.names.position(SHOP, None) is None
        assert old.names.position("other", 7) == 7
