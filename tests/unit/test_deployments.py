"""What deployments tell, by values alone; tests/integration/test_deployments*.py has those of real sites."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from gateway.auth.tokens import Token
from gateway.deployments import Deployer, DeploymentRequest, Record
from gateway.deployments import record as records
from gateway.deployments.context import Context
from gateway.deployments.phases import report_unsteady
from gateway.deployments.record import Register, State
from gateway.deployments.verify import SiteUnderTest
from gateway.errors import Conflict, NotFound, RateLimited
from gateway.events import Bus
from gateway.ownership.domains import Domains
from gateway.runtime.sites import Exposure, Recipe
from gateway.settings import Settings
from gateway.storage.store import Store
from tests.waits import settled, turn, until

OPERATOR = Token("me", frozenset({"*"}), frozenset({"admin"}), 0, "id")


class Told:
    """A bus that keeps what is published."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def publish(self, type: str, tenant: str | None, data: Any, deployment: str | None = None) -> None:
        self.events.append((type, data))

    def of(self, type: str) -> Any:
        (found,) = (data for kind, data in self.events if kind == type)
        return found


class Nothing:
    """Sites and a Caddy with nothing to undo, and no copies."""

    copies = services = tenants = None

    def url(self, domain: str) -> str:
        return f"https://{domain}"

    def unset(self, domain: str) -> None:
        pass

    def sleeps(self, domain: str) -> bool:
        return False

    def release(self, domain: str) -> None:
        pass

    async def remove(self, deployment: str) -> None:
        pass


def context(domains: Domains, register: Register, told: Told, settings: Settings, **more: Any) -> Context:
    nothing, bus = cast(Any, Nothing()), cast(Bus, told)
    parts = {"runtime": nothing, "sites": nothing, "caddy": nothing, "domains": domains, "register": register}
    return Context(**parts, bus=bus, settings=settings, **more)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[tuple[Deployer, Told]]:
    settings, told = Settings(state_dir=tmp_path), Told()
    nothing = cast(Any, Nothing())
    async with Store(tmp_path) as store:
        domains = await Domains.opened(nothing, store, cast(Bus, told), settings)
        register = Register(store, domains, settings)
        yield Deployer(context(domains, register, told, settings)), told


async def test_one_that_is_cancelled_before_it_began_says_where_it_stood(
    rig: tuple[Deployer, Told],
) -> None:
    deployments, told = rig  # not recovered yet, so that none begins
    record, _ = await deployments.begin(DeploymentRequest("shop.example.com", "static"), OPERATOR)
    await turn()  # until it waits: a request's cancel never comes before that
    ended = await deployments.cancel(record.id)
    assert ended.state == "rolledback"
    said = told.of("deployment.cancelled")
    assert (said["phase"], said["index"], said["of"]) == ("validate", 0, 8)
    assert said["error"]["code"] == "cancelled"


async def test_who_has_seen_the_end_may_begin_the_next_before_it_is_written_down(
    rig: tuple[Deployer, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or move the tenant to another server."""
    deployments, _ = rig
    ending, written, save = asyncio.Event(), asyncio.Event(), deployments._register.save

    async def slow(record: Record) -> None:
        ending.set()
        await written.wait()
        await save(record)

    first, _ = await deployments.begin(asked("a"), token("a"))
    await turn()  # until it waits
    assert deployments.deploying("a")
    monkeypatch.setattr(deployments._register, "save", slow)
    cancelled = asyncio.create_task(deployments.cancel(first.id))
    await ending.wait()
    assert (await deployments.get(first.id)).state == "rolledback"
    assert not deployments.deploying("a")
    second, new = await deployments.begin(asked("a"), token("a"))
    assert new and second.id != first.id
    written.set()
    await cancelled
    await cancel(deployments, second.id)


async def test_one_that_ends_during_a_look_is_not_ended_again(
    rig: tuple[Deployer, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of it before its end is not what it is."""
    deployments, told = rig
    record, _ = await deployments.begin(asked("a"), token("a"))
    assert await deployments._register.left() == []
    read = deployments._register._store.read

    async def late(work: Any) -> Any:
        found = await read(work)
        if work is records.unfinished_records:
            await cancel(deployments, record.id)
        return found

    monkeypatch.setattr(deployments._register._store, "read", late)
    assert await deployments._register.left() == []
    assert told.of("deployment.rolledback")


async def test_one_of_a_killed_gateway_says_where_it_stood(rig: tuple[Deployer, Told]) -> None:
    deployments, told = rig
    record = Record("shop", "shop.example.com", "https://shop.example.com", "static", "me", state="running")
    for phase, state in zip(record.phases, ("done", "done", "running"), strict=False):
        phase.state = cast(Any, state)
    await deployments._recovery.recover(record)
    said = told.of("deployment.failed")
    assert (said["phase"], said["index"], said["of"]) == ("push", 2, 8)
    assert told.of("deployment.rolledback")["error"]["message"] == "the gateway ended"


def token(*tenants: str, subject: str = "operator", issued: float = 0.0) -> Token:
    scopes = frozenset({"deploy"})
    return Token(subject, frozenset(tenants), scopes, 0, "id", frozenset({"*.example.com"}), issued=issued)


def asked(tenant: str, template: str | bytes = "static") -> DeploymentRequest:
    return DeploymentRequest(f"{tenant}.example.com", template, tenant=tenant)


async def cancel(deployments: Deployer, identity: str) -> None:
    await turn()  # until it waits: a request's cancel never comes before that
    await deployments.cancel(identity)


async def test_a_key_is_of_a_subject_and_the_tenants_of_its_token(rig: tuple[Deployer, Told]) -> None:
    """All tokens may have one subject: nobody gets another tenant's deployment by its key."""
    deployments, _ = rig
    mine, new = await deployments.begin(asked("a"), token("a"), key="1")
    theirs, also_new = await deployments.begin(asked("b"), token("b"), key="1")
    assert new and also_new and mine.id != theirs.id
    for who in (token("a"), token("a", "b"), token("*")):
        assert await deployments.begin(asked("a"), who, key="1") == (mine, False)
    for who in (token("a", "c"), token("*")):  # whoever may know of it is told of the other use
        with pytest.raises(Conflict):
            await deployments.begin(asked("c"), who, key="1")
    for record in (mine, theirs):  # on record as in memory
        await cancel(deployments, record.id)
    assert (await deployments.begin(asked("a"), token("a"), key="1"))[0].id == mine.id
    assert (await deployments.begin(asked("b"), token("b"), key="1"))[0].id == theirs.id
    other, new = await deployments.begin(asked("a"), token("a", subject="else"), key="1")
    assert new
    await cancel(deployments, other.id)


async def test_a_key_of_who_had_the_name_before_is_nobodys(tmp_path: Path) -> None:
    settings, nothing, ended = Settings(state_dir=tmp_path), cast(Any, Nothing()), dict[str, float]()
    async with Store(tmp_path) as store:
        domains = await Domains.opened(nothing, store, cast(Bus, Told()), settings)
        register = Register(store, domains, settings)
        names = cast(Any, SimpleNamespace(ended=lambda name: ended.get(name, 0.0)))
        deployments = Deployer(context(domains, register, Told(), settings, names=names))
        first, _ = await deployments.begin(asked("a"), token("a", issued=1.0), key="1")
        await cancel(deployments, first.id)
        ended["a"] = first.created + 1
        # who asked for it asks again: it was undone, which ended the tenant that it made
        again, new = await deployments.begin(asked("a"), token("a", issued=1.0), key="1")
        assert (again.id, new) == (first.id, False)
        second, new = await deployments.begin(asked("a"), token("a", issued=ended["a"] + 1), key="1")
        assert new and second.id != first.id
        await cancel(deployments, second.id)


NEXT: Mapping[State, set[State]] = {
    "waiting": {"running", "undoing", "rolledback"},
    "running": {"succeeded", "undoing"},
    "undoing": {"undoing", "rolledback"},
    "succeeded": set(),
    "rolledback": set(),
}


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("after", NEXT)
@pytest.mark.parametrize("before", NEXT)
def test_a_deployment_goes_from_state_to_state_as_the_table_says(
    before: State, after: State, settled: bool
) -> None:
    """Nothing is undone once it is settled, and an end is an end."""
    record = Record("shop", "shop.test", "", "static", "me", state=before, settled=settled)
    if after in NEXT[before] and not (settled and after in ("undoing", "rolledback")):
        record.enter(after)
        assert record.state == after
    else:
        with pytest.raises(AssertionError, match=f"cannot go from {before} to {after}"):
            record.enter(after)
        assert record.state == before


async def test_records_of_one_tenant_push_out_its_own_alone(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        for number in range(30):
            tenant = "quiet" if number < 3 else "greedy"
            record = Record(tenant, f"{tenant}.example.com", "", "static", "me", created=float(number))
            record.state, record.ended = "succeeded", float(number)
            await store.write(partial(records.insert_record, record=record, key=None, request="", kept=10))
            text, identity = orjson.dumps(record), record.id
            await store.write(
                partial(records.update_record, record=text, identity=identity, tenant=tenant, ended=1.0)
            )
        kept = await store.read(lambda db: records.recent_records(db, None, 100))
    assert [record.tenant for record in kept].count("quiet") == 3
    assert [record.created for record in kept if record.tenant == "greedy"] == [
        float(n) for n in range(29, 22, -1)
    ]


class Places:
    """Deployments that take as long as they are let, and say which of them run."""

    def __init__(self, rig: tuple[Deployer, Told], monkeypatch: pytest.MonkeyPatch) -> None:
        self.deployments = rig[0]
        self.running = list[str]()
        self.gates = dict[str, asyncio.Event]()
        self._changed = asyncio.Condition()
        self.deployments._recovered.set()
        monkeypatch.setattr(self.deployments._runner, "_attempt", self._attempt)

    async def _attempt(self, running: Any, held: Any) -> None:
        name = running.record.tenant
        gate = self.gates[name] = asyncio.Event()
        self.running.append(name)
        try:
            await gate.wait()
        finally:
            self.running.remove(name)
        running.record.error = {"code": "cancelled"}
        running.record.enter("undoing")

    async def begin(self, who: Token, *tenants: str) -> None:
        for tenant in tenants:
            await self.deployments.begin(asked(tenant), who)

    async def are(self, *names: str) -> None:
        await until(lambda: sorted(self.running) == sorted(names), every=0)
        for _ in range(3):  # whatever the store was asked for is written, and what follows from it was done
            await self.deployments._register._store.settled()
            await settled()
        assert sorted(self.running) == sorted(names)


@pytest.fixture
async def places(rig: tuple[Deployer, Told], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Places]:
    places = Places(rig, monkeypatch)
    yield places
    await places.deployments.end()


async def test_slow_deployments_of_one_leave_places_to_others(places: Places) -> None:
    """However many it asks for; and owners take turns."""
    greedy = token(*(f"g{n}" for n in range(6)))
    await places.begin(greedy, *(f"g{n}" for n in range(6)))
    await places.are("g0", "g1")
    await places.begin(token("x1", "x2"), "x1")
    await places.begin(token("y"), "y")
    await places.are("g0", "g1", "x1", "y")
    await places.begin(token("x1", "x2"), "x2")
    await places.begin(token("z"), "z")
    places.gates["g0"].set()
    await places.are("g1", "g2", "x1", "y")  # the turn of who waits longest
    places.gates["y"].set()
    await places.are("g1", "g2", "x1", "x2")
    places.gates["g1"].set()
    await places.are("g2", "x1", "x2", "z")


async def test_who_covers_all_leaves_one_place(places: Places) -> None:
    await places.begin(token("*"), *"abcde")
    await places.are("a", "b", "c")
    await places.begin(token("*", subject="another"), "f", "g")
    await places.are("a", "b", "c", "f")
    places.gates["a"].set()
    await places.are("b", "c", "f", "g")  # it has half, and another waits
    places.gates["g"].set()
    await places.are("b", "c", "d", "f")


async def test_one_that_is_cancelled_gives_its_place(places: Places) -> None:
    await places.begin(token("a", "b", "c", "d"), *"abcd")
    await places.are("a", "b")
    waiting, runs = (
        next(
            one.record.id
            for one in places.deployments._register.running.values()
            if one.record.tenant == name
        )
        for name in "ca"
    )
    await cancel(places.deployments, waiting)
    await cancel(places.deployments, runs)
    await places.are("b", "d")


async def test_waiting_has_a_share_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of how many wait, and of what their uploads take in memory; the rest is for others."""
    monkeypatch.setattr("gateway.deployments.queue.WAITING", 4)
    monkeypatch.setattr("gateway.deployments.queue.WAITING_BYTES", 1000)
    settings = Settings(state_dir=tmp_path)
    nothing = cast(Any, Nothing())
    async with Store(tmp_path) as store:
        domains = await Domains.opened(nothing, store, cast(Bus, Told()), settings)
        register = Register(store, domains, settings)
        deployments = Deployer(context(domains, register, Told(), settings))
        greedy = token("a", "b", "c")
        begun = [(await deployments.begin(asked(name), greedy))[0] for name in "ab"]
        with pytest.raises(RateLimited) as caught:
            await deployments.begin(asked("c"), greedy)
        assert caught.value.facts["retry_after"] > 0
        begun.append((await deployments.begin(asked("d"), token("d")))[0])
        for record in begun:
            await cancel(deployments, record.id)
        begun = [(await deployments.begin(asked("a", b"x" * 400), greedy))[0]]
        with pytest.raises(RateLimited):
            await deployments.begin(asked("b", b"x" * 400), greedy)
        begun.append((await deployments.begin(asked("d", b"x" * 400), token("d")))[0])
        for record in begun:
            await cancel(deployments, record.id)
        begun = [(await deployments.begin(asked("a", b"x" * 900), greedy))[0]]  # alone it is let in
        await cancel(deployments, begun[0].id)
        await deployments.end()


async def test_a_site_that_does_not_stay_is_told_while_its_tenant_is_there() -> None:
    unwell = list[tuple[str, int, str, str]]()
    tenants = [SimpleNamespace(status="running", instance="i-1")]

    async def get(tenant: str) -> Any:
        if not tenants:
            raise NotFound("gone")
        return tenants[0]

    runtime = SimpleNamespace(tenants=SimpleNamespace(get=get))
    health = SimpleNamespace(unwell=lambda *told: unwell.append(told))
    context = cast(Context, SimpleNamespace(runtime=runtime, health=health))
    record = Record("shop", "shop.test", "https://shop.test", "static", "me", instance="i-1")
    where = Exposure("10.0.0.2", 3000)
    site = SiteUnderTest("shop", "live", "shop.test", Recipe(b"", ("x",), 3000), where)
    await report_unsteady(context, record, site, "it ended")
    assert unwell == [("shop", 3000, "/", "it ended")]
    for status, instance in (("stopped", "i-1"), ("running", "i-2")):
        tenants[0] = SimpleNamespace(status=status, instance=instance)
        await report_unsteady(context, record, site, "it ended")
    tenants.clear()
    await report_unsteady(context, record, site, "it ended")
    assert len(unwell) == 1
