"""Copies of tenants on other members, and the tenants that come back from them when their member is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import aiohttp
import pytest

from gateway.host import HostError
from tests.cluster.conftest import MakeTenant, Served, heal, slack
from tests.cluster.rig import Member, Rig
from tests.cluster.test_dying import booted
from tests.cluster.test_forming import command, fourth, listed, quickstart
from tests.cluster.test_homes import group
from tests.cluster.test_own_instances import events
from tests.waits import pause, until

__all__ = ["fourth"]

pytestmark = [pytest.mark.timeout(900)]

TENANTS: Final = 10

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
async def test_ten_tenants_of_a_lost_server_are_back_within_half_a_minute_as_they_were_copied(
    cluster: Rig, client: Client, fourth: Member
) -> None:
    """By one command. Until then, and meanwhile, clients are told to come again; nothing is contested."""
    first = cluster.first
    token = command(first, "cluster", "add", fourth.name).strip()
    await asyncio.to_thread(quickstart, fourth, "--join", token)
    names = [f"t-lost-{number}" for number in range(TENANTS)]
    name, gateway = names[0], client(fourth)
    for one in names:
        words = ("launch", "gateway-base", one, "--profile", "gateway-tenant", "--target", fourth.name)
        await asyncio.to_thread(fourth.incus, *words)
    try:
        await write(gateway, name, "a.txt", "copied")
        fourth.incus("config", "set", name, f"user.gateway.domain={name}.example.com")
        identity = fourth.query(f"/1.0/instances/{name}")["config"]["volatile.uuid"]
        for one in names:
            fourth.incus("config", "set", one, "user.gateway.standby=5")
        first_copies = {one: await copied(gateway, one) for one in names}
        counts = (f"/v1/tenants/{name}/tools/Bash", {"command": "echo once >>/srv/site/count"})
        status, said = await gateway.ask("POST", *counts, Idempotency_Key="of-the-lost")
        assert status == 200 and not said["isError"]
        copy = await copied(gateway, name, (await copied(gateway, name, first_copies[name]["of"]))["of"])
        await asyncio.to_thread(fourth.cut_power)
        died = time.time()
        other = client(next(member for member in cluster.members if member.name != copy["member"]))

        async def away() -> bool:
            status, said = await other.ask("GET", f"/v1/tenants/{name}")
            return status == 503 and bool(said["reason"] == "member_away")

        await until(away, 20, every=0.2)
        await until_asked(lambda: listed(first)[fourth.name]["status"] != "Online")
        seen, back = Counter[tuple[int, str]](), dict[str, float]()
        asking = [asyncio.create_task(calls(other, one, seen, back)) for one in names]
        began = time.monotonic()
        said = await asyncio.to_thread(command, first, "cluster", "remove", fourth.name, "--force", "--yes")
        took = time.monotonic() - began
        await until(lambda: len(back) == TENANTS, 60, every=0.1)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        print(
            said,
            f"{TENANTS} are back after {took:.1f} s, the last answer {max(back.values()) - began:.1f}",
        )
        assert {status for status, _ in seen} <= {200, 503}, seen
        assert took < 30 * slack()
        status, said = await other.ask("GET", f"/v1/tenants/{name}")
        assert (status, said["location"], said["domain"]) == (200, copy["member"], f"{name}.example.com")
        assert "copied" in await read(other, name, "a.txt")
        status, said = await other.ask("POST", *counts, Idempotency_Key="of-the-lost")
        assert status == 200 or said["reason"] == "unknown_outcome", said
        assert (await read(other, name, "count")).count("once") == 1
        home = cluster.member(copy["member"])
        assert home.query(f"/1.0/instances/{name}")["config"]["volatile.uuid"] == identity
        assert group(home, identity), "its disk counts there"
        # what it has now is of copies to another member
        assert all(int(one.rpartition("-")[2]) > died * 1000 for one in snapshots(home, name))
        told = await events(other)
        assert ("tenant.recovered", name, home.name) in told
        assert not [one for one in told if one[0] == "tenant.domain.contested" and one[1] in names]
    finally:
        for one in names:
            with contextlib.suppress(HostError):
                await asyncio.to_thread(first.incus, "delete", "--force", one)


async def calls(gateway: Served, tenant: str, seen: Counter[tuple[int, str]], back: dict[str, float]) -> None:
    """Run a command in a tenant again and again; note each answer, and when the first one succeeds."""
    while True:
        status, said = await gateway.ask("POST", f"/v1/tenants/{tenant}/exec", {"argv": ["true"]})
        seen[status, str(said.get("reason", ""))] += 1
        if status == 200:
            back.setdefault(tenant, time.monotonic())
        await pause(0.3)


async def until_asked(done: Callable[[], bool]) -> None:
    """Wait for what is asked by a command, in a thread."""

    async def asked() -> bool:
        return await asyncio.to_thread(done)

    await until(asked, 60, every=0.5)


@pytest.mark.thorough
async def test_a_tenant_with_a_copy_is_started_with_its_server_by_the_gateway(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    """Incus itself leaves it alone, as its server may have been removed meanwhile."""
    dead = members[-1]
    home, tenant = client(dead), await make_tenant(dead)
    await write(home, tenant, "a.txt", "one")
    await asyncio.to_thread(dead.incus, "config", "set", tenant, "user.gateway.standby=3600")
    await copied(home, tenant)
    assert dead.query(f"/1.0/instances/{tenant}")["config"]["boot.autostart"] == "false"
    await asyncio.to_thread(dead.cut_power)
    await asyncio.to_thread(heal, dead)

    async def back() -> bool:
        try:
            return await booted(home, tenant)
        except aiohttp.ClientError:
            return False

    await until(back, 60, every=0.2)
    await asyncio.to_thread(dead.incus, "config", "set", tenant, "user.gateway.standby=0")

    def as_before() -> bool:
        return "boot.autostart" not in dead.query(f"/1.0/instances/{tenant}")["config"]

    await until(as_before, 60, every=0.5)
