"""Any gateway answers for the tenants of all members, at their home, and says where that is away."""

from __future__ import annotations

import asyncio
import io
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.conftest import MakeTenant, Served, heal
from tests.cluster.rig import Member, Rig
from tests.contracts.gateway import sse
from tests.waits import until

pytestmark = pytest.mark.timeout(300)

Client = Callable[[Member], Served]


async def known(client: Client, cluster: Rig, homes: dict[str, Member]) -> None:
    """Wait until each gateway lists each tenant at its home, running."""
    for member in cluster.members:

        async def all_there(member: Member = member) -> bool:
            found = await client(member).listed()
            return all(
                (found.get(name, {}).get("location"), found.get(name, {}).get("status"))
                == (home.name, "running")
                for name, home in homes.items()
            )

        await until(all_there, 60, every=0.2)


@pytest.mark.short
async def test_each_gateway_serves_the_tenants_of_each_member(
    cluster: Rig, client: Client, make_tenant: MakeTenant
) -> None:
    homes = {await make_tenant(member): member for member in cluster.members}
    await known(client, cluster, homes)
    for member, (name, home) in itertools.product(cluster.members, homes.items()):
        gateway = client(member)
        status, said = await gateway.ask("GET", f"/v1/tenants/{name}", tenants=(name,))
        assert (status, said["location"], said["usage"] is None) == (200, home.name, False)

        async def written() -> bool:  # its workspace is there once it has booted
            body = {"file_path": "note.txt", "content": f"by {member.name}"}  # noqa: B023 - awaited at once
            path = f"/v1/tenants/{name}/tools/Write"  # noqa: B023
            return (await gateway.ask("POST", path, body, tenants=(name,)))[0] == 200  # noqa: B023

        await until(written, 30, every=0.2)
        async with (
            gateway.http(name) as http,
            http.get(f"/v1/events?tenant={name}&type=file.written,exec.*") as events,
        ):
            async with http.get(f"/v1/tenants/{name}/files/note.txt") as file:
                assert (file.status, await file.text()) == (200, f"by {member.name}")
            big = bytes(3 << 20)
            async with http.put(f"/v1/tenants/{name}/files/big-{member.name}", data=io.BytesIO(big)) as put:
                assert put.status == 201
            async with http.get(f"/v1/tenants/{name}/files/big-{member.name}") as got:
                assert await got.read() == big
            async with gateway.raw(name) as wire:
                given: dict[str, Any] = {"client": {}, "token": gateway.token(name)}
                began = await wire.call("initialize", **given)
                assert began["home"]["member"] == home.name
                exit_, out, _ = await wire.run(argv=["hostname"])
                assert (exit_["exitCode"], out.decode().strip()) == (0, name)
                terminal = await wire.call("exec/start", argv=["cat"], pty={"cols": 80, "rows": 24})
                await wire.stdin(terminal["channel"], b"there\n")
                await wire.until(lambda: b"there" in wire.output[terminal["channel"], 1])  # noqa: B023
                assert (await wire.call("exec/cancel", exec=terminal["exec"]))["survivors"] == 0
            found = [one["event"] for one in await sse(events, 2)]
            assert found == ["file.written", "exec.started"]


async def test_new_tenants_are_spread_and_one_name_is_made_once(cluster: Rig, client: Client) -> None:
    """Whoever is asked with one key, and at the same time: one deployment, of which each gateway knows."""
    body = {"domain": "spread.localhost", "template": "static"}

    async def ask(member: Member) -> tuple[int, Any]:
        return await client(member).ask("POST", "/v1/deployments", body, Idempotency_Key="one key")

    answers = await asyncio.gather(*(ask(member) for member in cluster.members for _ in range(3)))
    assert {status for status, _ in answers} <= {200, 202}, answers
    (identity,) = {said["id"] for _, said in answers}
    try:
        for member in cluster.members:

            async def over(member: Member = member) -> bool:
                status, record = await client(member).ask("GET", f"/v1/deployments/{identity}")
                assert status == 200 and record["state"] not in ("undoing", "rolledback"), record
                return bool(record["state"] == "succeeded")

            await until(over, 110, every=0.2)
            _, said = await client(member).ask("GET", "/v1/deployments")
            assert [one["id"] for one in said["deployments"]].count(identity) == 1
            assert said["unanswered"] == []
    finally:
        await client(cluster.first).ask("DELETE", "/v1/tenants/spread-localhost")


@pytest.mark.thorough
async def test_the_tenants_of_a_dead_member_are_away_at_once(
    members: tuple[Member, ...], cluster: Rig, client: Client, make_tenant: MakeTenant
) -> None:
    leads = next(
        entry["server_name"]
        for entry in members[0].query("/1.0/cluster/members?recursion=1")
        if "database-leader" in entry["roles"]
    )
    dead = next(member for member in reversed(members) if member.name != leads)
    living = [member for member in members if member is not dead]
    homes = {await make_tenant(member): member for member in (dead, living[0])}
    away, stays = homes
    await known(client, cluster, homes)
    try:
        dead.cut_power()
        died = time.monotonic()
        for member in living:

            async def told(member: Member = member) -> bool:
                status, said = await client(member).ask("GET", f"/v1/tenants/{away}")
                return status == 503 and said["reason"] == "member_away" and said["location"] == dead.name

            await until(told, 10)
            assert time.monotonic() - died < 5
            began = time.monotonic()
            found = await client(member).listed()
            assert (found[away]["status"], found[away]["reason"]) == ("error", "member_away")
            assert found[stays]["status"] == "running" and time.monotonic() - began < 2
    finally:
        await asyncio.to_thread(heal, dead)
    await known(client, cluster, homes)
