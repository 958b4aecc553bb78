"""Many clients at all gateways at the same time: what each of them wants is done once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.conftest import MakeTenant, Served
from tests.cluster.rig import Member, Rig
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
