"""Copies of tenants on other members, and the tenants that come back from them when their member is lost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from gateway.host import HostError
from tests.cluster.conftest import MakeTenant, Served
from tests.cluster.rig import Member, Rig
from tests.cluster.test_forming import command, fourth, quickstart
from tests.cluster.test_own_instances import events
from tests.waits import pause, until

__all__ = ["fourth"]

pytestmark = [pytest.mark.timeout(400)]

Client = Callable[[Member], Served]


async def write(gateway: Served, tenant: str, name: str, text: str) -> None:
    body = {"file_path": f"/srv/site/{name}", "content": text}

    async def written() -> bool:
        status, said = await gateway.ask("POST", f"/v1/tenants/{tenant}/tools/Write", body)
        return status == 200 and not said["isError"]

    await until(written, 60, every=0.2)  # its workspace is there once it has booted


async def read(gateway: Served, tenant: str, name: str) -> str:
    body = {"file_path": f"/srv/site/{name}"}
    status, said = await gateway.ask("POST", f"/v1/tenants/{tenant}/tools/Read", body)
    return json.dumps(said) if status == 200 else str(status)


async def standby(gateway: Served, tenant: str) -> dict[str, Any]:
    status, said = await gateway.ask("GET", f"/v1/tenants/{tenant}")
    return said.get("standby") or {} if status == 200 else {}


async def copied(gateway: Served, tenant: str, since: str = "") -> dict[str, Any]:
    """Wait for a copy, later than `since`, and return what is told of it."""
    found: dict[str, Any] = {}

    async def there() -> bool:
        found.update(await standby(gateway, tenant))
        return str(found.get("of", "")) > since

    await until(there, 120, every=0.5)
    return found


def snapshots(member: Member, tenant: str, project: str = "default") -> list[str]:
    found = member.query(f"/1.0/instances/{tenant}/snapshots?project={project}")
    return [path.partition("?")[0].rpartition("/")[2] for path in found]


async def test_a_copy_follows_its_tenant_and_goes_with_it(
    cluster: Rig, client: Client, make_tenant: MakeTenant
) -> None:
    """One snapshot stays on each side, which clients do not see; what has not changed is not copied again."""
    home, *others = cluster.members
    gateway, name = client(home), await make_tenant(home)
    await write(gateway, name, "a.txt", "one")
    home.incus("config", "set", name, "user.gateway.standby=1", "user.gateway.port=3000", "limits.cpu=1")
    first = await copied(gateway, name)
    assert first["member"] in [member.name for member in others]
    await write(gateway, name, "a.txt", "two")
    second = await copied(gateway, name, first["of"])
    assert second["member"] == first["member"]
    (kept,) = snapshots(home, name)
    assert kept.startswith("_gateway-standby-") and kept in snapshots(home, name, "gateway-standby")
    assert (await gateway.ask("GET", f"/v1/tenants/{name}/snapshots"))[1] == {"snapshots": []}
    copy = home.query(f"/1.0/instances/{name}?project=gateway-standby")
    assert (copy["location"], copy["status"]) == (first["member"], "Stopped")
    assert copy["config"]["boot.autostart"] == "false" and not copy["profiles"]
    assert name not in [
        one["name"] for one in json.loads(home.incus("list", "--format=json")) if one["location"] != home.name
    ]

    await write(gateway, name, "a.txt", "three")  # the stop alone may change nothing
    await asyncio.to_thread(home.incus, "stop", "--force", name)
    await copied(gateway, name, second["of"])
    await pause(40)  # what was written late is on the disk by now, which counts as a change, and copied
    last = await standby(gateway, name)
    await pause(15)  # several rounds
    assert await standby(gateway, name) == last, "nothing has changed since"

    await gateway.ask("DELETE", f"/v1/tenants/{name}")

    def gone() -> bool:
        try:
            home.query(f"/1.0/instances/{name}?project=gateway-standby")
        except HostError:
            return True
        return False

    await until(gone, 30, every=0.5)


@pytest.mark.thorough
async def test_the_tenants_of_a_lost_server_come_back_elsewhere_as_they_were_copied(
    cluster: Rig, client: Client, fourth: Member
) -> None:
    """Once it is removed from the cluster; till then they are away, as it may come back."""
    first = cluster.first
    token = command(first, "cluster", "add", fourth.name).strip()
    await asyncio.to_thread(quickstart, fourth, "--join", token)
    name = "t-lost"
    words = ("launch", "gateway-base", name, "--profile", "gateway-tenant", "--target", fourth.name)
    await asyncio.to_thread(fourth.incus, *words)
    try:
        gateway = client(fourth)
        await write(gateway, name, "a.txt", "copied")
        fourth.incus(
            "config", "set", name, "user.gateway.standby=1", "user.gateway.domain=t-lost.example.com"
        )
        identity = fourth.query(f"/1.0/instances/{name}")["config"]["volatile.uuid"]
        before = (await copied(gateway, name))["of"]
        await write(gateway, name, "b.txt", "copied too")
        counts = (f"/v1/tenants/{name}/tools/Bash", {"command": "echo once >>/srv/site/count"})
        status, said = await gateway.ask("POST", *counts, Idempotency_Key="of-the-lost")
        assert status == 200 and not said["isError"]
        copy = {"of": before}
        for number in range(2):  # the first may have been begun before that
            await write(gateway, name, f"{number}.txt", "something to copy")
            copy = await copied(gateway, name, copy["of"])
        await asyncio.to_thread(fourth.cut_power)
        died = time.time() * 1000
        other = client(next(member for member in cluster.members if member.name != copy["member"]))

        async def away() -> bool:
            status, said = await other.ask("GET", f"/v1/tenants/{name}")
            return status == 503 and bool(said["reason"] == "member_away")

        await until(away, 20, every=0.2)
        await pause(5)
        assert await away()
        began = time.monotonic()
        await asyncio.to_thread(command, first, "cluster", "remove", fourth.name, "--force", "--yes")

        async def back() -> bool:
            status, said = await other.ask("POST", f"/v1/tenants/{name}/exec", {"argv": ["true"]})
            return status == 200 and bool(said["exit_code"] == 0)

        await until(back, 60, every=0.2)
        print(f"back after {time.monotonic() - began:.1f} s")
        status, said = await other.ask("GET", f"/v1/tenants/{name}")
        assert (status, said["location"], said["domain"]) == (200, copy["member"], "t-lost.example.com")
        assert "copied" in await read(other, name, "a.txt")
        assert "copied too" in await read(other, name, "b.txt")
        status, said = await other.ask("POST", *counts, Idempotency_Key="of-the-lost")
        assert status == 200 or said["reason"] == "unknown_outcome", said
        assert (await read(other, name, "count")).count("once") == 1
        home = cluster.member(copy["member"])
        assert home.query(f"/1.0/instances/{name}")["config"]["volatile.uuid"] == identity
        # what it has now is of copies to another member
        assert all(int(one.rpartition("-")[2]) > died for one in snapshots(home, name))
        assert ("tenant.recovered", name, home.name) in await events(other)
    finally:
        if fourth.pid is None:
            await asyncio.to_thread(first.incus, "delete", "--force", name)
        else:
            await asyncio.to_thread(fourth.incus, "delete", "--force", name)
