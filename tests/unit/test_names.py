"""Whose a tenant's name is: who has it now gets nothing of who had it before, whatever was missed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.errors import NotFound, Unavailable
from gateway.events import Bus, Filter, StoredJournal
from gateway.ownership.names import Names
from gateway.runtime import TenantEvent, TenantInstance, TenantRuntime
from gateway.settings import Settings
from gateway.storage.store import Store
from tests.waits import turn, until

SHOP = frozenset({"shop"})
LIMITED, ALL = Filter(SHOP), Filter()


class Tenants:
    """A runtime that has these instances by name, and tells what it is told to."""

    def __init__(self, **instances: str) -> None:
        self.instances = instances
        self.told: asyncio.Queue[TenantEvent] = asyncio.Queue()
        self.away = self.odd = False
        self.asked = 0

    async def get(self, name: str) -> TenantInstance:
        self.asked += 1
        if self.odd:
            raise KeyError("config")
        if self.away:
            raise Unavailable("Incus is away")
        if name not in self.instances:
            raise NotFound(f"no tenant {name}")
        return TenantInstance(name, "running", instance=self.instances[name])

    async def list(self, *, addresses: bool = True) -> list[TenantInstance]:
        assert not addresses, "incusd would look into each container, while clients wait"
        return [await self.get(name) for name in self.instances]

    async def watch(self) -> AsyncIterator[TenantEvent]:
        yield TenantEvent("gateway.resynced", None)
        while True:
            yield await self.told.get()

    def tell(self, kind: str, name: str = "shop", **data: Any) -> None:
        self.told.put_nowait(TenantEvent(kind, name, data))


class Gateway:
    """One life of a gateway, as far as it has to do with names."""

    def __init__(self, bus: Bus, names: Names, tenants: Tenants) -> None:
        self.bus, self.names, self.tenants = bus, names, tenants
        self.ended: list[str] = []
        self._taken = asyncio.Event()
        self.resynced = asyncio.Event()

    async def follow(self) -> None:
        runtime = cast(TenantRuntime, SimpleNamespace(tenants=self.tenants, changes=self.tenants))
        async for event in self.names.watch(runtime):
            if event.ended is not None:
                self.ended.append(event.ended)
            told = self.bus.publish(event.type, event.tenant, event.data)
            await self.names.took(runtime, event, told)
            if event.type == "gateway.resynced":
                self.resynced.set()
            self._taken.set()
            self._taken = asyncio.Event()

    async def until(self, instance: str, name: str = "shop") -> None:
        async with asyncio.timeout(30):
            await self.resynced.wait()
            while self.names.holder(name) != instance:
                await self._taken.wait()

    async def seen(self, filter: Filter = LIMITED, after: int = 0) -> Sequence[str]:
        """Return the types of all that a replay gives up to now, the gap before it left out."""
        last = self.bus.publish("gateway.mark")
        found = list[str]()
        async with asyncio.timeout(30):
            async for event in self.bus.subscribe(filter, after):
                if event.id == last.id:
                    return found
                found += [] if event.type in ("gap", "gateway.mark") else [event.type]
        raise AssertionError("the subscription ended")


@contextlib.asynccontextmanager
async def gateway(folder: Path, tenants: Tenants, **settings: Any) -> AsyncIterator[Gateway]:
    async with Store(folder) as store, contextlib.AsyncExitStack() as stack:
        journal = StoredJournal(store, kept=1000, kept_bytes=1 << 20, age=1e6)
        await stack.enter_async_context(journal)
        bus = Bus(journal)
        life = Gateway(bus, await Names.opened(store, bus, Settings(**settings)), tenants)
        following = asyncio.create_task(life.follow())
        try:
            yield life
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def test_a_name_has_the_events_of_who_has_it_now(tmp_path: Path) -> None:
    """From the end of the last one on; of what came late of that one nothing, of a deployment all."""
    async with gateway(tmp_path, tenants := Tenants(shop="1", other="o")) as life:
        await life.until("1")
        life.bus.publish("deployment.succeeded", "shop", deployment="d-1")
        life.bus.publish("file.written", "shop", {"path": "secret"})
        life.bus.publish("file.written", "other", {"path": "other"})
        assert await life.seen() == ["gateway.resynced", "deployment.succeeded", "file.written"]
        del tenants.instances["shop"]
        tenants.tell("tenant.destroyed")
        await life.until("")
        life.bus.publish("exec.exited", "shop", {"late": True})
        between = ["gateway.resynced", "tenant.destroyed"]
        assert await life.seen() == between
        life.bus.publish("deployment.started", "shop", deployment="d-2")
        tenants.instances["shop"] = "2"
        tenants.tell("tenant.created")
        await life.until("2")
        life.bus.publish("file.written", "shop", {"path": "mine"})
        mine = [*between, "deployment.started", "tenant.created", "file.written"]
        assert await life.seen() == mine
        assert (await life.seen(ALL)).count("file.written") == 3
    async with gateway(tmp_path, tenants) as life:
        await life.until("2")
        assert [kind for kind in await life.seen() if kind != "gateway.resynced"] == mine[1:]


async def test_a_deployment_is_followed_by_its_id_whatever_became_of_its_tenant(tmp_path: Path) -> None:
    async with gateway(tmp_path, tenants := Tenants(shop="1")) as life:
        await life.until("1")
        life.bus.publish("deployment.failed", "shop", deployment="d-1")
        tenants.instances.clear()
        tenants.tell("tenant.destroyed")
        await life.until("")
        end = life.bus.publish("deployment.rolledback", "shop", deployment="d-1")
        found = list[str]()
        async with asyncio.timeout(30):
            async for event in life.bus.subscribe(Filter(SHOP, deployments=frozenset({"d-1"})), 0):
                found.append(event.type)
                if event.id == end.id:
                    break
        assert found[-2:] == ["deployment.failed", "deployment.rolledback"]


async def test_who_listened_all_the_while_hears_all(tmp_path: Path) -> None:
    async with gateway(tmp_path, tenants := Tenants(shop="1")) as life:
        await life.until("1")
        live = life.bus.subscribe(Filter(SHOP, types=("exec.*", "tenant.*")))
        life.bus.publish("exec.started", "shop")
        tenants.instances.clear()
        tenants.tell("tenant.destroyed")
        await life.until("")
        life.bus.publish("exec.exited", "shop")
        found = list[str]()
        async with asyncio.timeout(30):
            while len(found) < 3:
                found += [event.type for event in await live.batch()]
        assert found == ["exec.started", "tenant.destroyed", "exec.exited"]


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"shop": "1"}, []),
        ({"shop": "2"}, ["tenant.destroyed", "tenant.created", "tenant.started"]),
        ({}, ["tenant.destroyed"]),
    ],
    ids=["the same", "another", "nobody"],
)
async def test_what_became_of_a_name_while_the_gateway_was_away(
    tmp_path: Path, now: Mapping[str, str], told: Sequence[str]
) -> None:
    """It is told once, and holds for the lives after that."""
    async with gateway(tmp_path, Tenants(shop="1")) as life:
        await life.until("1")
        life.bus.publish("file.written", "shop")
    for again in (False, True):
        async with gateway(tmp_path, Tenants(**now)) as life:
            await life.until(now.get("shop", ""))
            seen = [kind for kind in await life.seen() if kind != "gateway.resynced"]
            assert seen == (told or ["file.written"])
            assert life.ended == ["shop"] * (bool(told) and not again)


async def test_one_that_came_after_the_end_was_told_has_nothing_of_it_either(tmp_path: Path) -> None:
    """Its beginning is told by nothing; who had the name wrote to the end."""
    async with gateway(tmp_path, tenants := Tenants(shop="1")) as life:
        await life.until("1")
        tenants.instances.clear()
        tenants.tell("tenant.destroyed")
        await life.until("")
        life.bus.publish("exec.exited", "shop", {"late": True})
    async with gateway(tmp_path, Tenants(shop="2")) as life:
        await life.until("2")
        life.bus.publish("file.written", "shop")
        seen = [kind for kind in await life.seen() if kind != "gateway.resynced"]
        assert seen == ["tenant.destroyed", "file.written"]


async def test_a_missed_end_is_found_by_the_next_beginning(tmp_path: Path) -> None:
    async with gateway(tmp_path, tenants := Tenants(shop="1")) as life:
        await life.until("1")
        life.bus.publish("file.written", "shop")
        tenants.instances["shop"] = "2"
        tenants.tell("tenant.created")
        await life.until("2")
        assert await life.seen() == ["gateway.resynced", "tenant.destroyed", "tenant.created"]


async def test_a_name_ends_with_a_rename_too(tmp_path: Path) -> None:
    async with gateway(tmp_path, tenants := Tenants(shop="1")) as life:
        await life.until("1")
        life.bus.publish("file.written", "shop")
        tenants.instances = {"store": "1"}
        tenants.tell("tenant.renamed", "store", **{"from": "shop", "action": "instance-renamed"})
        await life.until("1", "store")
        assert (life.names.holder("shop"), life.ended) == ("", ["shop"])
        assert await life.seen() == ["gateway.resynced"]
        life.bus.publish("file.written", "store")
        assert "file.written" in await life.seen(Filter(frozenset({"store"})))


async def test_replays_wait_until_it_is_known_whose_the_names_are(tmp_path: Path) -> None:
    """Where Incus is away when the gateway starts; who covers all tenants does not wait, nor what is new."""
    async with gateway(tmp_path, Tenants(shop="1")) as life:
        await life.until("1")
        life.bus.publish("file.written", "shop")
    tenants = Tenants(shop="2")
    tenants.away = True
    async with gateway(tmp_path, tenants) as life:
        assert "file.written" in await life.seen(ALL)
        live = life.bus.subscribe(LIMITED)
        replay = asyncio.ensure_future(life.seen())
        ended = life.bus.subscribe(LIMITED, 0)
        ending = asyncio.ensure_future(ended.batch())
        mark = life.bus.publish("gateway.mark")
        async with asyncio.timeout(30):
            while (await live.batch())[-1].id < mark.id:
                pass
            assert not replay.done()
            ended.close()
            assert await ending == ()
            tenants.away = False
            # what was published until then is of whoever had the name
            assert "file.written" not in await replay
        life.bus.close()


async def test_a_replay_that_waits_ends_with_the_gateway(tmp_path: Path) -> None:
    tenants = Tenants(shop="1")
    tenants.away = True
    async with gateway(tmp_path, tenants) as life:
        waiting = asyncio.ensure_future(life.bus.subscribe(LIMITED, 0).batch())
        await turn()
        life.bus.close()
        assert await asyncio.wait_for(waiting, 30) == ()


async def test_no_end_is_made_of_a_tenant_that_cannot_be_asked_for(tmp_path: Path) -> None:
    """A list may leave out one that is just changing."""

    class Changing(Tenants):
        async def list(self, *, addresses: bool = True) -> list[TenantInstance]:
            return []

        async def get(self, name: str) -> TenantInstance:
            raise Unavailable("it is being changed")

    async with gateway(tmp_path, Tenants(shop="1")) as life:
        await life.until("1")
        life.bus.publish("file.written", "shop")
    async with gateway(tmp_path, Changing()) as life:
        assert "file.written" in await life.seen()
        assert (life.names.holder("shop"), life.ended) == ("1", [])


async def test_deployments_are_of_who_has_the_name_or_comes_to_have_it(tmp_path: Path) -> None:
    async with gateway(tmp_path, tenants := Tenants(shop="1")) as life:
        await life.until("1")
        assert life.names.is_present("shop", 1.0)
        tenants.instances.clear()
        tenants.tell("tenant.destroyed")
        await life.until("")
        ended = life.names._holders["shop"].at
        for at, present in ((ended - 1, False), (ended + 1, True)):
            assert life.names.is_present("shop", at) is present
        assert life.names.is_present("other", 1.0)


async def test_a_destroyed_tenant_is_over_once_that_was_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(tmp_path, tenants := Tenants(shop="1")) as life:
        await life.until("1")
        over = asyncio.ensure_future(life.names.over("shop", "1"))
        await turn()
        assert not over.done()
        tenants.instances["shop"] = "2"
        tenants.tell("tenant.destroyed")
        tenants.tell("tenant.created")
        await asyncio.wait_for(over, 30)
        await life.until("2")
        await life.names.over("shop", "1")  # that one is no more
        monkeypatch.setattr("gateway.ownership.names._TOLD", 0.01)
        await life.names.over("shop", "2")  # nobody tells of it: it is not waited for for ever


async def test_names_that_were_are_bounded(tmp_path: Path) -> None:
    bound = {"events_kept": 2, "deployments_kept": 1}
    async with gateway(tmp_path, tenants := Tenants(shop="1"), **bound) as life:
        await life.until("1")
        for name in "abcde":
            tenants.tell("tenant.destroyed", name)
        tenants.instances["last"] = "l"
        tenants.tell("tenant.created", "last")
        await life.until("l", "last")
        assert set(life.names._holders) == {"shop", "last", *"cde"}
    async with gateway(tmp_path, tenants, **bound) as life:
        await life.seen()
        assert set(life.names._holders) == {"shop", "last", *"cde"}


async def test_an_end_that_was_not_written_hides_nothing_of_the_next_life(tmp_path: Path) -> None:
    """A gateway that is killed loses the latest events, whose ids others get."""
    async with gateway(tmp_path, Tenants(shop="1")) as life:
        await life.until("1")
    async with Store(tmp_path) as store:
        await store.write(lambda c: c.execute("UPDATE names SET instance = '', ended = ended + 1 << 40"))
    async with gateway(tmp_path, Tenants(shop="2")) as life:
        await life.until("2")
        life.bus.publish("file.written", "shop")
        assert "file.written" in await life.seen()


async def test_an_answer_that_nobody_understands_ends_no_watch(tmp_path: Path) -> None:
    tenants = Tenants(shop="1")
    tenants.odd = True
    async with gateway(tmp_path, tenants) as life, asyncio.timeout(30):
        await until(lambda: tenants.asked > 0)
        tenants.odd = False
        await life.until("1")
        tenants.odd, tenants.asked = True, 0
        tenants.tell("tenant.created", "new")
        tenants.tell("tenant.destroyed")
        await until(lambda: "shop" in life.ended)
        assert tenants.asked


async def test_one_that_left_has_its_events_here_as_long_as_the_name_is_its_own(tmp_path: Path) -> None:
    """Wherever it is: whoever has its name later gets nothing of them, nor does anybody who is not known."""
    async with gateway(tmp_path, tenants := Tenants(shop="1")) as life:
        await life.until("1")
        life.bus.publish("file.written", "shop")
        del tenants.instances["shop"]
        for _ in range(2):
            await life.names.leave("shop")
        assert life.names.holder("shop") == ""
    async with gateway(tmp_path, tenants) as life:
        await life.seen()
        assert life.ended == []  # it is no end
        for there, seen in (("1", True), ("2", False), (None, False)):
            life.names.elsewhere = {"shop": there}.get
            assert ("file.written" in await life.seen()) == seen


async def test_one_that_came_has_no_position_here_from_before(tmp_path: Path) -> None:
    """Neither a number alone, which may be its former home's, nor one of an earlier stay."""
    async with gateway(tmp_path, Tenants(other="o")) as life:
        life.bus.member = "m2"
        await life.until("o", "other")
        life.bus.publish("file.written", "shop")  # of one that had the name long ago
        before = life.bus.last
        await life.names.arrive("shop", "1", 5.0)
        assert (life.names.holder("shop"), life.names.ended("shop")) == ("1", 5.0)
        since = life.bus.publish("tenant.moved", "shop").id
        last: str | int | None
        for last, position in (
            (since + 1000, 0),
            (str(since), 0),
            (f"m1:{since}", 0),
            (f"m2:{before - 1}", 0),
            (f"m1:7,m2:{since}", since),
            (None, None),
            ("", None),
        ):
            assert life.names.position("shop", last) == position
        assert life.names.position("other", 3) == 3
        assert [kind for kind in await life.seen() if kind != "gateway.resynced"] == ["tenant.moved"]
