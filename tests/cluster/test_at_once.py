"""Many clients at all gateways at the same time: what each of them wants is done once."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from gateway.hostnames import tenant_name
from tests.cluster.conftest import ENDED, MakeTenant, Served
from tests.cluster.rig import Member, Rig
from tests.contracts.processes import mark
from tests.waits import pause, until

Client = Callable[[Member], Served]

_AT_ONCE = 8  # keys on their way, each at all gateways
_AGAIN = 0.5  # seconds


async def answered(gateway: Served, path: str, body: dict[str, Any], *well: int, key: str) -> tuple[int, Any]:
    """Return the answer of a POST, asked again as a client does where it could not be decided."""
    while True:
        status, said = await gateway.ask("POST", path, body, Idempotency_Key=key)
        if status not in (429, 503):
            assert status in well, said
            return status, said
        await pause(_AGAIN)


@pytest.mark.short
@pytest.mark.timeout(300)
async def test_two_hundred_keys_at_all_gateways_at_once_have_two_hundred_effects(
    cluster: Rig, client: Client, make_tenant: MakeTenant
) -> None:
    gateways = [client(member) for member in cluster.members]
    name = await make_tenant(cluster.members[1])
    path, room = f"/v1/tenants/{name}", asyncio.Semaphore(_AT_ONCE)

    async def booted() -> bool:
        body = {"file_path": "/srv/site/effects", "content": ""}
        return (await gateways[0].ask("POST", f"{path}/tools/Write", body))[0] == 200

    await until(booted, 60, every=0.5)

    async def everywhere(number: int) -> None:
        body, key = {"command": f"echo {number} >> /srv/site/effects"}, f"key {number}"
        async with room:
            asked = (answered(gateway, f"{path}/tools/Bash", body, 200, key=key) for gateway in gateways)
            answers = await asyncio.gather(*asked)
        assert not any(said["isError"] for _, said in answers), answers

    await asyncio.gather(*map(everywhere, range(200)))
    async with gateways[2].http(name) as http, http.get(f"{path}/files/effects") as file:
        assert Counter((await file.text()).split()) == {str(number): 1 for number in range(200)}


@pytest.mark.thorough
@pytest.mark.timeout(560)
async def test_twenty_sites_that_are_deployed_at_once_are_each_served_by_each_caddy(
    cluster: Rig, client: Client
) -> None:
    """By three gateways that are asked in turn; and one domain, asked for twice, is one tenant's."""
    gateways = [client(member) for member in cluster.members]
    group = mark()
    domains = [f"m-{group}-{number}.example.com" for number in range(20)]
    names = [tenant_name(domain) for domain in domains]
    rival = f"m-{group}-rival"

    async def deploy(number: int, domain: str, tenant: str) -> dict[str, Any]:
        gateway, body = gateways[number % 3], {"domain": domain, "template": "static", "tenant": tenant}
        _, begun = await answered(gateway, "/v1/deployments", body, 200, 202, 409, key=f"{group} {tenant}")
        record: dict[str, Any] = {"state": "refused"} if "id" not in begun else {}

        async def over() -> bool:
            status, said = await gateway.ask("GET", f"/v1/deployments/{begun['id']}")
            record.update(said if status == 200 else {})
            return record.get("state") in ENDED

        if not record:
            await until(over, 400, every=0.5)
        return record

    async def own_page(gateway: Served, name: str) -> None:
        words = ["sh", "-c", f"echo {name} >/srv/site/public/own.txt"]
        status, said = await gateway.ask("POST", f"/v1/tenants/{name}/exec", {"argv": words})
        assert (status, said["exit_code"]) == (200, 0), said

    async def shown(gateway: Served, domain: str, name: str) -> bool:
        return await gateway.visit(domain, "/own.txt") == (200, f"{name}\n")

    began = time.monotonic()
    try:
        tasks = [deploy(number, *pair) for number, pair in enumerate(zip(domains, names, strict=True))]
        *records, other = await asyncio.gather(*tasks, deploy(1, domains[0], rival))
        states = [record["state"] for record in records]
        assert states[1:] == ["succeeded"] * 19, records
        assert sorted((states[0] == "succeeded", other["state"] == "succeeded")) == [False, True]
        names[0] = names[0] if states[0] == "succeeded" else rival
        print(f"deployed in {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.0f}")
        homes = {one["name"]: one["location"] for one in (await gateways[0].listed()).values()}
        assert {homes[name] for name in names} == {member.name for member in cluster.members}
        for number, (domain, name) in enumerate(zip(domains, names, strict=True)):
            await own_page(gateways[number % 3], name)
            for gateway in gateways:
                await until(lambda: shown(gateway, domain, name), 30, every=0.3)  # noqa: B023 - awaited at once
    finally:
        for name in {*names, rival}:
            await gateways[0].ask("DELETE", f"/v1/tenants/{name}")
