"""The steps of a move at Incus: what is copied, what it is called meanwhile, and who takes it for a tenant.

`tests/cluster/test_moving.py` has a real cluster do the same.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Conflict, NotFound, Unavailable
from gateway.incus import Elsewhere, Incus, IncusError
from gateway.incus.rest import Operation
from gateway.rootfs import bridge_port
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.disks import Disks
from gateway.runtime.incus.moves import Moves
from gateway.settings import Settings
from tests.waits import until

SHOP = {
    "name": "shop",
    "type": "container",
    "architecture": "x86_64",
    "status": "Running",
    "profiles": ["gateway-tenant"],
    "location": "m1",
    "config": {
        "volatile.uuid": "i-1",
        "volatile.base_image": "sha",
        "volatile.eth0.hwaddr": "00:16:3e:00:00:01",
        "volatile.last_state.power": "RUNNING",
        "user.gateway.domain": "shop.test",
        "user.gateway.made": "i-1",
        "raw.lxc": "lxc.net.0.ipv4.address = 10.82.0.2/20\n",
        "limits.cpu": "2",
    },
    "devices": {"eth0": {"type": "nic", "network": "br", "ipv4.address": "10.82.0.2"}},
    "snapshots": [],
}


class Member(Incus):
    """The incusd of one member of a cluster whose instances are `all`."""

    def __init__(self, name: str, all: dict[str, dict[str, Any]]) -> None:
        super().__init__(Path("/nowhere"), "default", 1.0)
        self.name, self.all = name, all
        self.copied: list[dict[str, Any]] = []
        self.heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def member(self) -> str:
        return self.name

    def _found(self, name: str) -> dict[str, Any]:
        if name not in self.all:
            raise IncusError("Instance not found", 404)
        found = copy.deepcopy(self.all[name])
        managed = {"user.gateway.managed": "true"}  # by the profile
        expanded = {"expanded_config": managed | found["config"], "expanded_devices": found["devices"]}
        return found | expanded | {"name": name, "state": {}}

    async def get(self, path: str, **query: str) -> Any:
        match path.split("/")[2:]:
            case ["instances", name]:
                return self._found(name)
            case ["instances", name, "snapshots"]:
                there = self.all[name]["snapshots"]
                taken = [f"{path}/{one}" for one in there]
                shown = [{"name": f"{name}/{one}", "created_at": one} for one in there]
                return shown if query else taken
            case ["instances"]:
                return [f"/1.0/instances/{name}" for name in self.all]
        raise AssertionError(path)

    async def own(self, path: str, **query: str) -> Any:
        if path.endswith("/leases"):
            return []
        return [self._found(name) for name, one in self.all.items() if one["location"] == self.name]

    async def instance(self, name: str, **_: Any) -> dict[str, Any]:
        found = self._found(name)
        if found["location"] != self.name:
            raise Elsewhere(name, found["location"])
        return found

    async def profile(self, name: str) -> dict[str, Any]:
        return {"devices": {"eth0": {"type": "nic", "network": "br"}}}

    async def events(self, *types: str) -> AsyncGenerator[dict[str, Any]]:
        yield {"type": "connected"}
        while True:
            yield await self.heard.get()

    async def operate(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float,
        if_match: str | None = None,
        target: str | None = None,
    ) -> Operation:
        given = copy.deepcopy(dict(body or {}))
        match method, path.split("/")[2:]:
            case "POST", ["instances"]:
                self._copy(given)
            case "POST", ["instances", name]:
                if given["name"] in self.all:
                    raise IncusError("Name is already in use", 400)
                self.all[given["name"]] = self.all.pop(name)
            case "PATCH", ["instances", name]:
                config = self.all[name]["config"] | given["config"]
                self.all[name]["config"] = {key: value for key, value in config.items() if value}
            case "PUT", ["instances", name]:
                self.all[name] |= {key: given[key] for key in ("config", "devices", "profiles")}
            case "DELETE", ["instances", name]:
                del self.all[name]
            case "POST", ["instances", name, "snapshots"]:
                self.all[name]["snapshots"].append(given["name"])
            case "DELETE", ["instances", name, "snapshots", snapshot]:
                self.all[name]["snapshots"].remove(snapshot)
            case _:
                raise AssertionError(f"{method} {path}")
        return Operation(ok=True)

    def _copy(self, given: dict[str, Any]) -> None:
        self.copied.append(given)
        source, name = self.all["shop"], given["name"]
        assert given["source"] == {"type": "copy", "source": "shop", "refresh": True}
        there = self.all.get(name, {})
        assert there.get("location", self.name) == self.name and there.get("status", "Stopped") == "Stopped"
        kept = {key: given[key] for key in ("type", "profiles", "config", "devices", "architecture")}
        self.all[name] = {
            **{"location": self.name, "status": "Stopped"},
            **kept,
            "snapshots": list(source["snapshots"]),
        }


def steps(incus: Member, incusd: Path = Path("/nowhere")) -> Moves:
    settings = Settings(network_ipv4="10.82.0.1/20", incus_socket=incusd / "unix.socket")
    return Moves(settings, incus, Creation(settings, incus))


@pytest.fixture
def all_() -> dict[str, dict[str, Any]]:
    return {"shop": copy.deepcopy(SHOP)}


@pytest.fixture
def old(all_: dict[str, dict[str, Any]]) -> Member:
    return Member("m1", all_)


@pytest.fixture
def new(all_: dict[str, dict[str, Any]]) -> Member:
    return Member("m2", all_)


@pytest.mark.parametrize("guarded", [False, True])
async def test_a_copy_becomes_the_tenant_with_an_address_of_its_new_member(
    old: Member, new: Member, tmp_path: Path, guarded: bool
) -> None:
    there, here = steps(old), steps(new, tmp_path)
    if guarded:  # the new member has one table for all tenants' addresses
        hook = bridge_port.guard_hook(tmp_path, "gatewaybr0")
        hook.parent.mkdir()
        hook.touch()
    old.all["theirs"] = copy.deepcopy(SHOP) | {"location": "m2"}  # who has that address on the other member
    for number in range(2):
        await there.snapshot("shop", number)
        await here.copy("shop", "i-1", "7")
        await there.forget_snapshots("shop", number)
        assert old.all["shop"]["snapshots"] == [f"_gateway-move-{number}"]
    copied = new.all["Moving-7"]
    assert (copied["config"]["user.gateway.managed"], copied["config"]["volatile.uuid"]) == ("false", "i-1")
    assert copied["config"]["user.gateway.domain"] == "shop.test"
    address = copied["devices"]["eth0"]["ipv4.address"]
    assert address != "10.82.0.2" and f"{address}/20" in copied["config"]["raw.lxc"]
    # what concerns a machine is the old one's
    assert not {"volatile.eth0.hwaddr", "volatile.last_state.power"} & copied["config"].keys()
    # since then it has got other settings
    old.all["shop"]["status"] = "Stopped"
    old.all["shop"]["config"] |= {"user.gateway.domain": "other.test", "limits.cpu": "4"}
    old.all["shop"]["devices"]["root"] = {"type": "disk", "size": "2GiB"}
    await here.copy("shop", "i-1", "7", last=True)
    managed = await there.managed("shop")
    for _ in range(2):  # each step may be repeated
        await there.put_aside("shop", "i-1", "7")
    assert "shop" not in new.all and new.all["Moved-7"]["config"]["user.gateway.managed"] == "false"
    for _ in range(2):
        await here.take_over("shop", "i-1", "7", managed)
    shop = new.all["shop"]
    assert (shop["location"], shop["config"]["user.gateway.domain"], shop["config"]["limits.cpu"]) == (
        *("m2", "other.test"),
        "4",
    )
    assert not {"user.gateway.managed", "user.gateway.moving"} & shop["config"].keys()
    nic = {"type": "nic", "network": "br", "ipv4.address": address}
    assert shop["devices"] == {
        "eth0": bridge_port.guarded(nic, IPv4Address(address)) if guarded else nic,
        "root": {"type": "disk", "size": "2GiB"},
    }
    await there.put_aside("shop", "i-1", "7")  # of the old home, which does not know yet how far it came
    for _ in range(2):
        await there.discard_old("7")
    await here.forget_snapshots("shop")
    assert set(new.all) == {"shop", "theirs"} and shop["snapshots"] == []


async def test_one_that_was_put_aside_can_be_brought_back(old: Member) -> None:
    old.all["shop"]["status"] = "Stopped"
    before = copy.deepcopy(old.all)
    await steps(old).put_aside("shop", "i-1", "7")
    for _ in range(2):
        await steps(old).bring_back("shop", "i-1", "7", None)
    assert old.all == before


async def test_a_copy_of_a_move_that_is_given_up_is_removed(old: Member, new: Member) -> None:
    await steps(new).copy("shop", "i-1", "7")
    for _ in range(2):
        await steps(new).discard_copy("7")
    assert set(new.all) == {"shop"}


async def test_another_instance_of_the_name_is_neither_copied_nor_put_aside(old: Member, new: Member) -> None:
    with pytest.raises(Conflict):
        await steps(new).copy("shop", "i-0", "7")
    with pytest.raises(Conflict):
        await steps(old).put_aside("shop", "i-0", "7")
    old.all["Moving-7"] = copy.deepcopy(SHOP) | {"location": "m2"}
    with pytest.raises(Conflict):  # it is somebody's tenant
        await steps(new).discard_copy("7")
    assert set(new.all) == {"shop", "Moving-7"}


async def test_snapshots_of_ours_are_not_shown(old: Member) -> None:
    await steps(old).snapshot("shop", 0)
    old.all["shop"]["snapshots"].append("before")
    assert [one.name for one in await Disks(Settings(), old).snapshots("shop")] == ["before"]


async def test_what_a_move_does_is_not_told_as_renamed_nor_destroyed(tmp_path: Path, old: Member) -> None:
    runtime = IncusRuntime(Settings(state_dir=tmp_path, reconcile_interval=0.02), incus=old)
    told: list[tuple[str, str | None]] = []

    async def watch() -> None:
        async for event in runtime.changes.watch():
            told.append((event.type, event.tenant))  # noqa: PERF401 - it never ends

    watching = asyncio.create_task(watch())
    try:
        await until(lambda: told == [("gateway.resynced", None)])
        runtime.containers.leaving.add("shop")
        old.all["Moved-7"] = old.all.pop("shop") | {"config": {"user.gateway.managed": "false"}}

        def tell(action: str, name: str, **more: Any) -> None:
            metadata = {"action": f"instance-{action}", "name": name, **more}
            old.heard.put_nowait({"type": "lifecycle", "metadata": metadata})

        tell("renamed", "Moved-7", context={"old_name": "shop"})
        tell("created", "Moving-8")
        tell("snapshot-created", "shop", source="/1.0/instances/shop/snapshots/_gateway-move-1")
        tell("deleted", "Moved-7")
        old.all["last"] = copy.deepcopy(SHOP)
        tell("created", "last")
        await until(lambda: ("tenant.created", "last") in told)
        assert {tenant for _, tenant in told} == {None, "last"}
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_nobody_opens_the_files_of_one_that_leaves(tmp_path: Path, old: Member) -> None:
    """A write would be on the old disk, after the last copy of it."""
    runtime = IncusRuntime(Settings(state_dir=tmp_path), incus=old)
    runtime.containers.leaving.add("shop")
    with pytest.raises(Unavailable) as refused:
        await runtime.filesystem("shop")
    assert refused.value.facts["reason"] == "moving"
    with pytest.raises(NotFound):
        await runtime.tenants.get("nobody")
