"""What the gateways of a cluster decide together: sites, domains, new tenants, revoked tokens."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from gateway.auth import tokens
from tests.cluster.conftest import MakeTenant, Served, heal
from tests.cluster.rig import CHECKOUT, Member, Rig
from tests.contracts.processes import mark
from tests.live import SECRET
from tests.waits import until

pytestmark = pytest.mark.timeout(300)

Client = Callable[[Member], Served]


def domains(cluster: Rig) -> dict[str, Any]:
    """Return member and tenant of each domain, as Incus has them."""
    found: dict[str, tuple[int, str]] = {}
    for profile in cluster.first.query("/1.0/profiles?project=gateway-keys&recursion=1"):
        key, _, number = profile["name"].rpartition("@")
        if key.startswith("domain."):
            found[key] = max(found.get(key, (0, "")), (int(number), profile["config"].get("user.value", "")))
    return {key.removeprefix("domain."): json.loads(value) for key, (_, value) in found.items() if value}


@pytest.fixture
async def domain(cluster: Rig, client: Client) -> AsyncIterator[str]:
    """A domain whose tenant, if there is one in the end, is destroyed."""
    name = f"t-{mark()}"
    yield f"{name}.example.com"

    async def gone() -> bool:
        status, _ = await client(cluster.first).ask("DELETE", f"/v1/tenants/{name}-example-com")
        return status in (200, 204, 404)

    await until(gone, 60, every=0.5)


async def visited(gateway: Served, domain: str, status: int = 200) -> str:
    """Return what a member's Caddy answers for a domain once it has this status; routes follow soon."""
    said: list[str] = []

    async def there() -> bool:
        found, text = await gateway.visit(domain)
        said[:] = [text]
        return found == status

    await until(there, 20, every=0.2)
    return said[0]


@pytest.mark.short
async def test_each_caddy_serves_each_domain_also_of_one_address_on_two_members(
    cluster: Rig, client: Client
) -> None:
    """The bridges of all members have the same addresses."""
    gateways = [client(member) for member in cluster.members]
    names = [f"t-{mark()}-{number}" for number in range(2)]
    try:
        made = []
        for name, member in zip(names, cluster.members, strict=False):
            words = ("--profile", "gateway-tenant", "--target", member.name)
            device = ("--device", "eth0,ipv4.address=10.82.0.99")
            await asyncio.to_thread(member.incus, "launch", "gateway-base", name, *words, *device)
            script = (
                f"mkdir -p /w && echo 'site of {name}' > /w/index.html && cd /w && "
                "(nohup python3 -m http.server 3000 >/dev/null 2>&1 &)"
            )
            for key, value in (("domain", f"{name}.example.com"), ("port", "3000")):
                member.incus("config", "set", name, f"user.gateway.{key}={value}")
            await asyncio.to_thread(member.incus, "exec", name, "--", "sh", "-c", script)
            made.append(member)
        for gateway, name in itertools.product(gateways, names):
            domain = f"{name}.example.com"
            assert (await visited(gateway, domain)).strip() == f"site of {name}", gateway.member.name
        addresses = {
            json.loads(member.incus("query", f"/1.0/instances/{name}"))["expanded_devices"]["eth0"][
                "ipv4.address"
            ]
            for name, member in zip(names, cluster.members, strict=False)
        }
        assert addresses == {"10.82.0.99"}
        assert {name: of[0] for name, of in domains(cluster).items() if name[:-12] in names} == {
            f"{name}.example.com": member.name for name, member in zip(names, made, strict=True)
        }
    finally:
        for name, member in zip(names, cluster.members, strict=False):
            await asyncio.to_thread(member.incus, "delete", "--force", name)


async def test_one_key_at_all_gateways_at_once_makes_one_deployment(
    cluster: Rig, client: Client, domain: str
) -> None:
    """Ten times at each gateway; and each entrance serves the site."""
    gateways = [client(member) for member in cluster.members]
    body, key = {"domain": domain, "template": "static"}, mark()

    async def begin(gateway: Served) -> str:
        said: dict[str, Any] = {}

        async def begun() -> bool:  # as a client does: where it could not be decided, it asks again
            status, answer = await gateway.ask("POST", "/v1/deployments", body, Idempotency_Key=key)
            said.update(answer)
            assert status in (200, 202, 503), answer
            return status != 503

        await until(begun, 30, every=0.5)
        return str(said["id"])

    begun = await asyncio.gather(*(begin(gateway) for gateway in gateways * 10))
    assert len(set(begun)) == 1, set(begun)
    record: dict[str, Any] = {}

    async def over() -> bool:
        record.update((await gateways[1].ask("GET", f"/v1/deployments/{begun[0]}"))[1])
        return record["state"] in ("succeeded", "rolledback")

    await until(over, 120, every=0.3)
    assert record["state"] == "succeeded", record
    for gateway in gateways:
        await visited(gateway, domain)


@pytest.mark.short
async def test_a_domain_is_one_tenants_whoever_deploys_it_where(
    cluster: Rig, client: Client, domain: str
) -> None:
    """Three tenants, one at each gateway, ask for one domain at the same time."""
    gateways = [client(member) for member in cluster.members]
    names = [f"{domain.partition('.')[0]}-{number}" for number in range(len(gateways))]
    try:
        records = await asyncio.gather(
            *(_deployed(gateway, domain, name) for gateway, name in zip(gateways, names, strict=True))
        )
        assert sorted(records) == ["domain_owned", "domain_owned", "succeeded"]
        winner = names[records.index("succeeded")]
        assert domains(cluster)[domain][1] == winner
        for gateway in gateways:
            await visited(gateway, domain)
    finally:
        for name in names:
            await gateways[0].ask("DELETE", f"/v1/tenants/{name}")
    await until(lambda: domain not in domains(cluster), 60, every=0.5)


async def _deployed(gateway: Served, domain: str, tenant: str) -> str:
    """Return how a deployment ended: `succeeded`, or the reason why not."""
    body = {"domain": domain, "template": "static", "tenant": tenant}
    status, begun = await gateway.ask("POST", "/v1/deployments", body)
    if status != 202:
        return str(begun.get("reason"))
    record: dict[str, Any] = {}

    async def over() -> bool:
        record.update((await gateway.ask("GET", f"/v1/deployments/{begun['id']}"))[1])
        return record["state"] in ("succeeded", "rolledback")

    await until(over, 120, every=0.3)
    return "succeeded" if record["state"] == "succeeded" else str(record["error"].get("reason"))


async def test_a_revoked_token_is_refused_everywhere_within_a_second(
    cluster: Rig, client: Client, members: tuple[Member, ...]
) -> None:
    """Also at a gateway that was down: it is back with what it missed."""
    gateways = [client(member) for member in members]
    raw = tokens.issue(SECRET, "t", ["*"], ["files:read"], 600)
    headers = {"Authorization": f"Bearer {raw}"}

    async def status(gateway: Served) -> int:
        async with gateway.http("*") as session:
            async with session.get("/v1/tenants", headers=headers) as answer:
                return answer.status

    assert [await status(gateway) for gateway in gateways] == [200] * 3
    await asyncio.to_thread(members[2].ours, "ungateway")
    body = {"id": tokens.token_id(raw), "expires": time.time() + 600}
    began = time.monotonic()
    async with gateways[0].http("*", scopes=("admin",)) as session:
        async with session.post("/v1/revocations", json=body) as said:
            answer = await said.json()
    assert (answer["recorded"], answer["unheard"]) == (True, ["m3"])
    assert [await status(gateway) for gateway in gateways[:2]] == [401, 401]
    assert time.monotonic() - began < 5
    await asyncio.to_thread(heal, members[2])

    async def refused() -> bool:
        return await status(gateways[2]) == 401

    await until(refused, 30)


@pytest.mark.thorough
async def test_no_gateway_puts_a_tenant_to_sleep_that_is_used_at_another(
    cluster: Rig, client: Client, make_tenant: MakeTenant
) -> None:
    """A command that was begun at each of the others keeps it awake, and then nothing does."""
    home, *others = cluster.members
    name = await make_tenant(home)
    path = f"/v1/tenants/{name}/exec"
    await until(lambda: _known(client(others[0]), name), 30, every=0.5)
    home.incus("config", "set", name, "user.gateway.idle_stop=1")
    body = {"argv": ["sleep", "40"], "timeout_ms": 100_000}
    ends = await asyncio.gather(*(client(other).ask("POST", path, body) for other in others))
    assert [(status, said["exit_code"]) for status, said in ends] == [(200, 0)] * 2

    async def asleep() -> bool:
        return bool(home.query(f"/1.0/instances/{name}")["status"] == "Stopped")

    await until(asleep, 60, every=0.5)


async def _known(gateway: Served, tenant: str) -> bool:
    return (await gateway.ask("GET", f"/v1/tenants/{tenant}"))[0] == 200


_COUNT = """
import asyncio
from pathlib import Path
from gateway.cluster.keys import IncusKeys
from gateway.incus import Incus

async def count():
    async with Incus(Path("/var/lib/incus/unix.socket"), "t-race", 20) as incus, IncusKeys(incus, 20) as keys:
        for _ in range(10):
            while True:
                before = await keys.get("count")
                if await keys.swap("count", before, str(int(before or 0) + 1)):
                    break
    print(before)

asyncio.run(count())
"""


async def test_members_that_count_at_once_lose_no_count(cluster: Rig) -> None:
    """Incus's ETags do: two members check one before either writes."""
    path = f"{CHECKOUT}:{CHECKOUT}/clients/python"

    def count(member: Member) -> int:
        words = ("env", f"--chdir={CHECKOUT}", sys.executable, "-c", _COUNT)
        return int(member.run(*words, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1"))

    try:
        last = await asyncio.gather(*(asyncio.to_thread(count, member) for member in cluster.members))
        assert max(last) + 1 == 30
    finally:
        for name in cluster.first.query("/1.0/profiles?project=t-race"):
            profile = name.rpartition("/")[2].partition("?")[0]
            if profile != "default":
                cluster.first.incus("profile", "delete", "--project", "t-race", profile)
        cluster.first.incus("project", "delete", "t-race")
