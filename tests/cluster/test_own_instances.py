"""Each gateway keeps to the tenants of its own member, and takes none that is away for destroyed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.conftest import MakeTenant, Served, heal
from tests.cluster.rig import Member, Rig
from tests.waits import until

pytestmark = pytest.mark.timeout(300)

_REPLAY = 2.0  # seconds for what a gateway keeps to arrive: a stream does not end by itself

Client = Callable[[Member], Served]


def location(member: Member, name: str) -> str:
    return str(member.query(f"/1.0/instances/{name}")["location"])


async def events(gateway: Served) -> list[tuple[str, str | None, str]]:
    """Return type, tenant and member of each event that the gateways keep, as one of them tells it."""
    found = list[tuple[str, str | None, str]]()
    async with (
        gateway.http("*", scopes=("admin",)) as session,
        session.get("/v1/events", headers={"Last-Event-ID": "0"}) as answer,
    ):
        assert answer.status == 200
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPLAY):
                async for line in answer.content:
                    if line.startswith(b"data:") and (event := json.loads(line[5:])).get("type"):
                        found.append(
                            (event["type"], event.get("subject"), event["source"].rpartition("/")[2])
                        )
    return found


async def test_each_gateway_has_the_tenants_of_all_and_keeps_to_its_own(
    cluster: Rig, client: Client, make_tenant: MakeTenant
) -> None:
    """What happens to a tenant is told once, by its home: the others never took it for theirs."""
    homes = {await make_tenant(member): member for member in cluster.members}
    wanted = {name: home.name for name, home in homes.items()}
    for member in cluster.members:

        async def located(member: Member = member) -> bool:
            found = await client(member).listed()
            return {name: found[name]["location"] for name in wanted.keys() & found.keys()} == wanted

        await until(located, 30)
        for name, home in homes.items():
            status, said = await client(member).ask("GET", f"/v1/tenants/{name}")
            assert (status, said["location"]) == (200, home.name)
        told = [
            (name, where)
            for kind, name, where in await events(client(member))
            if kind == "tenant.started" and name in homes
        ]
        assert sorted(told) == sorted(wanted.items())


async def test_files_and_commands_are_the_homes_whichever_gateway_is_asked(
    cluster: Rig, client: Client, make_tenant: MakeTenant
) -> None:
    _, home, other = cluster.members
    name = await make_tenant(home)
    path = f"/v1/tenants/{name}"
    body = {"file_path": "/srv/site/note.txt", "content": "here"}

    async def written() -> bool:
        status, said = await client(home).ask("POST", f"{path}/tools/Write", body)
        return status == 200 and not said["isError"]

    await until(written, 30)  # its workspace is there once it has booted
    for member in (home, other):
        status, said = await client(member).ask("POST", f"{path}/exec", {"argv": ["hostname"]})
        assert (status, said["stdout"].strip()) == (200, name)
        read = {"file_path": "/srv/site/note.txt"}
        status, said = await client(member).ask("POST", f"{path}/tools/Read", read)
        assert status == 200
        assert "here" in json.dumps(said)


async def test_what_a_gateway_makes_is_made_on_its_member(cluster: Rig, client: Client) -> None:
    """Clones, golden copies and the pool, wherever Incus would have put them; of which each has its own."""
    asked = cluster.first
    homes = dict[str, str]()
    for number in range(2):
        record = await client(asked).deploy(f"here-{number}.localhost")
        assert record["state"] == "succeeded", record
        homes[record["tenant"]] = location(asked, record["tenant"])
    for name, home in homes.items():
        copy = f"t-copy-of-{name}"
        status, said = await client(asked).ask("POST", f"/v1/tenants/{name}/clone", {"tenant": copy})
        assert status == 201, said
        assert location(asked, copy) == home
        # asked there: both may have one address
        status, _ = await client(cluster.member(home)).visit(f"{name.removesuffix('-localhost')}.localhost")
        assert status == 200

    def prepared() -> list[dict[str, Any]]:
        listed = json.loads(asked.incus("list", "--format=json"))
        return [one for one in listed if one["config"].get("user.gateway.role") in ("golden", "pool")]

    await until(lambda: {one["location"] for one in prepared()} >= {*homes.values()}, 90, every=1)
    owners = {(one["location"], one["config"]["user.gateway.owner"]) for one in prepared()}
    # one of each member, and none of two
    assert len(owners) == len({owner for _, owner in owners}) == len({member for member, _ in owners})
    for name in homes:
        for gone in (name, f"t-copy-of-{name}"):
            assert (await client(asked).ask("DELETE", f"/v1/tenants/{gone}"))[0] in (200, 204)


@pytest.mark.thorough
async def test_a_tenant_that_is_moved_is_not_destroyed(
    cluster: Rig, client: Client, make_tenant: MakeTenant
) -> None:
    first, second, _ = cluster.members
    name = await make_tenant(first)

    async def at(member: Member) -> bool:
        """Return whether all gateways take a member for its home."""
        found = [await client(one).listed() for one in (first, second)]
        return all(name in there and there[name]["location"] == member.name for there in found)

    await until(lambda: at(first), 30)
    await asyncio.to_thread(first.incus, "stop", "--force", name)
    await asyncio.to_thread(first.incus, "move", name, "--target", second.name, timeout=240)
    await asyncio.to_thread(first.incus, "start", name)
    await until(lambda: at(second), 30)
    for member in (first, second):
        told = await events(client(member))
        assert not [event for event in told if event[:2] == ("tenant.destroyed", name)]


@pytest.mark.thorough
async def test_a_dead_member_delays_no_list_and_its_tenants_come_back_with_their_records(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    """Of one that does not lead, since a leader's death stops all of them for half a minute."""
    leads = next(
        entry["server_name"]
        for entry in members[0].query("/1.0/cluster/members?recursion=1")
        if "database-leader" in entry["roles"]
    )
    dead = next(member for member in reversed(members) if member.name != leads)
    living = next(member for member in members if member is not dead)
    homes = {await make_tenant(member): member for member in (dead, living)}
    away, stays = homes
    await until(lambda: there(client(dead), away), 20)
    await until(lambda: there(client(living), stays), 20)

    async def counted() -> bool:
        """Make a call that has an effect, always the same one; return whether it is made."""
        status, said = await client(dead).ask("POST", *call, Idempotency_Key=f"of-{away}")
        return status == 200 and not said["isError"]

    call = (f"/v1/tenants/{away}/tools/Bash", {"command": "echo once >>/srv/site/count"})
    await until(counted, 30)  # its workspace is there once it has booted
    try:
        dead.cut_power()
        for _ in range(5):
            begun = time.monotonic()
            assert (await client(living).listed())[stays]["status"] == "running"
            status, said = await client(living).ask("POST", f"/v1/tenants/{stays}/exec", {"argv": ["true"]})
            assert (status, said["exit_code"]) == (200, 0)
            assert time.monotonic() - begun < 5
        found = (await client(living).listed())[away]
        assert (found["status"], found["reason"], found["location"]) == ("error", "member_away", dead.name)
    finally:
        await asyncio.to_thread(heal, dead)
    await until(lambda: there(client(dead), away), 60)
    # its record is there still: it is not made again, though a power cut may take what came of it just then
    status, said = await client(dead).ask("POST", *call, Idempotency_Key=f"of-{away}")
    assert status == 200 or (status, said["reason"]) == (410, "unknown_outcome"), said
    read = {"file_path": "/srv/site/count"}
    status, said = await client(dead).ask("POST", f"/v1/tenants/{away}/tools/Read", read)
    assert (status, json.dumps(said).count("once")) == (200, 1), said
    for member in (dead, living):
        told = await events(client(member))
        assert not [event for event in told if event[0] == "tenant.destroyed" and event[1] in homes]


async def there(gateway: Served, name: str) -> bool:
    found = await gateway.listed()
    return name in found and found[name]["status"] == "running"
