"""In a cluster each gateway keeps to its own member's instances; `tests/cluster` asks a real one the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Conflict, NotFound, Unavailable
from gateway.incus import Elsewhere, Incus, IncusError
from gateway.incus.monitor import concerns
from gateway.limits.capacity import _instances_left
from gateway.rootfs.locations import Instances
from gateway.runtime import OnAnotherServer
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.golden_copies import Marks, owner, prepared_key
from gateway.runtime.sites import Recipe
from gateway.settings import Settings
from tests.unit.incusd import answering, instance
from tests.waits import until


class Cluster(Incus):
    """The incusd of member m1; `there` has the member of each instance of the cluster."""

    def __init__(self, there: dict[str, str], *, clustered: bool = True) -> None:
        super().__init__(Path("/nowhere"), "default", 1.0)
        self.there, self.clustered = there, clustered
        self.asked: list[str] = []
        self.heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def entry(self, name: str) -> dict[str, Any]:
        location = self.there[name] if self.clustered else "none"
        return instance(name, location=location, status="Stopped", expanded_devices={}, devices={})

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        alone: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        words = [method, path, *(f"{key}={value}" for key, value in (query or {}).items())]
        self.asked.append(" ".join([*words, *(["alone"] if alone else [])]))
        metadata: Any = {}
        match method, path.split("/")[2:]:
            case "GET", []:
                metadata = {"environment": {"server_clustered": self.clustered, "server_name": "m1"}}
            case "GET", ["instances"] if not query:
                metadata = [f"/1.0/instances/{name}" for name in self.there]
            case "GET", ["instances"]:
                own = {"m1"} if alone else {"m1", "m2"}
                metadata = [self.entry(name) for name, member in self.there.items() if member in own]
            case "GET", ["instances", name]:
                if name not in self.there:
                    raise IncusError("Instance not found", 404)
                metadata = self.entry(name)
            case "GET", ["projects", _]:
                metadata = {"config": {"limits.instances": "5"}}
            case "GET", ["networks", _, "leases"] | ["operations"]:
                metadata = {}
            case _:
                pass
        return {"type": "sync", "metadata": metadata, "etag": ""}

    async def events(self, *types: str) -> AsyncGenerator[dict[str, Any]]:
        yield {"type": "connected"}
        while True:
            yield await self.heard.get()


async def test_a_list_has_the_own_members_instances_and_asks_no_other() -> None:
    incus = Cluster({"shop": "m1", "cafe": "m2"})
    assert [one["name"] for one in await incus.instances()] == ["shop"]
    await incus.busy()
    await incus.own("/1.0/networks/gw/leases")
    assert incus.asked == [
        "GET /1.0",
        "GET /1.0/instances recursion=1 alone",
        "GET /1.0/operations recursion=1 alone",
        "GET /1.0/networks/gw/leases alone",
    ]


async def test_another_members_instance_is_elsewhere_whoever_asks_for_it() -> None:
    incus = Cluster({"shop": "m1", "cafe": "m2"})
    assert (await incus.instance("shop"))["name"] == "shop"
    for asking in (
        incus.instance("cafe"),
        incus.instance("cafe", state=lambda one: False),
        incus.started("cafe"),
    ):
        with pytest.raises(Elsewhere) as caught:
            await asking
        assert caught.value.location == "m2"
    with pytest.raises(IncusError) as missing:
        await incus.instance("nobody")
    assert missing.value.status == 404


async def test_one_that_is_moved_leaves_the_kept_list() -> None:
    incus = Cluster({"shop": "m1", "cafe": "m1"})
    incus._inventory.listening(True)
    assert len(await incus.instances()) == 2
    incus.there["cafe"] = "m2"
    incus._inventory.touched("cafe")
    assert [one["name"] for one in await incus.instances()] == ["shop"]


async def test_what_is_created_is_created_here() -> None:
    """Incus would choose the member with the fewest instances, and send a copy's disk there."""
    incus = Cluster({})
    await incus.operate("POST", "/1.0/instances", {"name": "shop"}, timeout=1)
    await incus.operate("POST", "/1.0/instances/shop", {"name": "cafe"}, timeout=1)  # a rename
    assert incus.asked[1:] == ["POST /1.0/instances target=m1", "POST /1.0/instances/shop"]


async def test_without_a_cluster_nothing_is_asked_differently() -> None:
    incus = Cluster({"shop": "m1"}, clustered=False)
    await incus.instances()
    await incus.instance("shop")
    await incus.operate("POST", "/1.0/instances", {"name": "cafe"}, timeout=1)
    await incus.own("/1.0/networks/gw/leases")
    assert incus.asked == [
        "GET /1.0",  # once
        "GET /1.0/instances recursion=1",
        "GET /1.0/instances/shop recursion=1",
        "POST /1.0/instances",
        "GET /1.0/networks/gw/leases",
    ]


async def test_a_projects_limit_counts_the_instances_of_all_members(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    runtime = IncusRuntime(settings, incus=Cluster({"shop": "m1", "cafe": "m2"}))
    assert await _instances_left(runtime, settings) == 3


@pytest.mark.parametrize(
    ("event", "heard"),
    [
        ({"type": "lifecycle", "location": "m1", "metadata": {"action": "instance-started"}}, True),
        ({"type": "lifecycle", "location": "m2", "metadata": {"action": "instance-started"}}, False),
        ({"type": "lifecycle", "location": "m2", "metadata": {"action": "instance-snapshot-created"}}, False),
        ({"type": "lifecycle", "location": "m2", "metadata": {"action": "profile-updated"}}, True),
        ({"type": "operation", "location": "m2", "metadata": {}}, False),
        ({"type": "lifecycle", "location": "none", "metadata": {"action": "instance-started"}}, True),
        ({"type": "connected"}, True),
    ],
)
def test_a_member_hears_of_its_own_instances_and_of_what_is_common(event: Any, heard: bool) -> None:
    assert concerns("m1", event) is heard


async def test_a_tenant_that_is_elsewhere_is_not_gone(tmp_path: Path) -> None:
    """`NotFound` would have its records forgotten."""
    runtime = IncusRuntime(Settings(state_dir=tmp_path), incus=Cluster({"cafe": "m2"}))
    init_pid = runtime.containers.init_pid
    for asking in (runtime.tenants.get("cafe"), runtime.filesystem("cafe"), init_pid("cafe")):
        with pytest.raises(OnAnotherServer) as caught:
            await asking
        assert caught.value.facts == {"reason": "elsewhere", "location": "m2"}
    with pytest.raises(NotFound):
        await runtime.tenants.get("nobody")


async def test_only_what_is_nowhere_any_more_is_told_as_destroyed(tmp_path: Path) -> None:
    """A tenant that an operator moved while no event was heard, and one that was deleted."""
    incus = Cluster({"shop": "m1", "moved": "m1", "deleted": "m1"})
    runtime = IncusRuntime(Settings(state_dir=tmp_path, reconcile_interval=0.02), incus=incus)
    told = list[tuple[str, str | None]]()

    async def watch() -> None:
        async for event in runtime.changes.watch():
            told.append((event.type, event.tenant))

    watching = asyncio.create_task(watch())
    try:
        await until(lambda: ("gateway.resynced", None) in told)
        incus.there["moved"] = "m2"
        await until(lambda: "GET /1.0/instances" in incus.asked)  # by name, of all members
        del incus.there["deleted"]
        await until(lambda: ("tenant.destroyed", "deleted") in told)
    finally:
        watching.cancel()
        await asyncio.wait([watching])
    assert told == [("gateway.resynced", None), ("tenant.destroyed", "deleted")]


async def test_without_a_quorum_nobody_is_told_as_destroyed(tmp_path: Path) -> None:
    class Alone(Cluster):
        async def names(self, project: str | None = None) -> set[str]:
            self.asked.append("names")
            raise IncusError("no available cowsql leader server found", 500)

    incus = Alone({"shop": "m1"})
    runtime = IncusRuntime(Settings(state_dir=tmp_path, reconcile_interval=0.02), incus=incus)
    told = list[str]()

    async def watch() -> None:
        async for event in runtime.changes.watch():
            told.append(event.type)

    watching = asyncio.create_task(watch())
    try:
        await until(lambda: told == ["gateway.resynced"])
        del incus.there["shop"]
        await until(lambda: incus.asked.count("names") > 1)
    finally:
        watching.cancel()
        await asyncio.wait([watching])
    assert set(told) == {"gateway.resynced"}


async def test_a_cluster_without_a_quorum_is_not_ready(tmp_path: Path) -> None:
    """Incus describes itself without its database; nothing else that is asked then is answered."""

    class Deciding(Cluster):
        quorum = asyncio.Event()

        async def _request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
            if path != "/1.0":
                await self.quorum.wait()
            return await super()._request(method, path, **options)

    incus = Deciding({})
    runtime = IncusRuntime(Settings(state_dir=tmp_path), incus=incus)
    with pytest.raises(Unavailable) as caught:
        async with asyncio.timeout(30):
            await runtime.ready()
    assert caught.value.facts["reason"] == "no_quorum"
    incus.quorum.set()
    with pytest.raises(Unavailable, match="event stream"):
        await runtime.ready()


async def test_one_that_came_into_a_cluster_since_is_not_ready(tmp_path: Path) -> None:
    """What it knows of instances may be another member's by now."""
    incus = Cluster({}, clustered=False)
    runtime = IncusRuntime(Settings(state_dir=tmp_path), incus=incus)
    await incus.instances()
    incus.clustered = True
    with pytest.raises(Unavailable, match="restart the gateway"):
        await runtime.ready()


async def test_a_dead_members_name_is_taken(tmp_path: Path) -> None:
    """It is listed by name; a look at the instance itself would wait for the member."""
    incus = Cluster({"cafe": "m3"})
    making = Creation(Settings(state_dir=tmp_path), incus)
    await making.free("shop")
    with pytest.raises(Conflict):
        await making.free("cafe")
    assert "GET /1.0/instances/cafe" not in incus.asked


async def test_each_members_prepared_instances_have_an_owner_and_names_of_their_own(tmp_path: Path) -> None:
    """The state dirs of all have the same path."""
    settings = Settings(state_dir=tmp_path)
    assert len({owner(settings, member) for member in ("", "m1", "m2")}) == 3
    recipe = Recipe(b"", ("true",), 3000, key="static")
    assert len({prepared_key(settings, recipe, "image", member) for member in ("", "m1", "m2")}) == 3
    incus = Cluster({})
    marks = Marks(settings, incus)
    await incus.instances()
    made = {"config": marks.of("pool", "key")}
    assert made["config"]["user.gateway.owner"] == owner(settings, "m1")
    assert marks.on(instance("pool-1", **made), "pool")
    made["config"]["user.gateway.owner"] = owner(settings, "m2")  # as after an evacuation of m2
    assert not marks.on(instance("pool-1", **made), "pool")


def test_the_broker_opens_nothing_of_another_member(tmp_path: Path) -> None:
    """What is at that path here would be another instance's."""
    place = str(tmp_path / "incus.socket")
    table = {
        "/1.0": {"environment": {"server_name": "m1", "server_clustered": True}},
        "/1.0/instances/shop": instance("shop", location="m1"),
        "/1.0/instances/cafe": instance("cafe", location="m2"),
    }
    found = Instances(place, "default", "/srv/app", 1000, "gw", "pool")
    with answering(Path(place), table):
        assert found.disk("shop", "/srv/app").path.endswith("/containers/shop/rootfs")
        with pytest.raises(Unavailable, match="another server"):
            found.disk("cafe", "/srv/app")


class Copying(Cluster):
    """One whose instance is copied to another member, as long as `attempts` are left."""

    def __init__(self, attempts: float) -> None:
        super().__init__({"one": "m1"})
        self.attempts, self.message = attempts, 'Instance is busy running a "migrate" operation'

    async def _request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        if method == "PATCH" and self.attempts > 0:
            self.attempts -= 1
            raise IncusError(f"Failed to create instance update operation: {self.message}", 400)
        return {"type": "sync", "metadata": {}} if method == "PATCH" else await super()._request(method, path)


async def test_a_change_waits_until_a_copy_to_another_member_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer than it may take; other refusals are told at once."""
    monkeypatch.setattr("gateway.incus.client._PAUSE", 0.001)
    copying = Copying(3)
    assert (await copying.operate("PATCH", "/1.0/instances/one", {"config": {}}, timeout=60)).ok
    assert copying.attempts == 0
    with pytest.raises(IncusError, match="busy"):
        await Copying(float("inf")).operate("PATCH", "/1.0/instances/one", {}, timeout=0.05)
    other = Copying(1)
    other.message = 'Instance is busy running a "stop" operation'
    with pytest.raises(IncusError, match="stop"):
        await other.operate("PATCH", "/1.0/instances/one", {}, timeout=60)
