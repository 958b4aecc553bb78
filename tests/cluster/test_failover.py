"""Tenants that come back by themselves when their server dies, and never answer at two members at once."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import aiohttp
import pytest

from gateway.host import HostError
from tests.cluster.conftest import MakeTenant, Served, heal
from tests.cluster.rig import Member, Rig
from tests.cluster.test_dying import Calls, booted, commands, leader
from tests.cluster.test_own_instances import events
from tests.cluster.test_standby import copied, read, write
from tests.waits import pause, until

pytestmark = [pytest.mark.timeout(500), pytest.mark.thorough]

Client = Callable[[Member], Served]

LEASE: Final = 10
FAILOVER: Final = 20
_SERVE: Final = {"GATEWAY_FAILOVER": str(FAILOVER), "GATEWAY_LEASE": str(LEASE)}


def serve(member: Member) -> None:
    """Have a member on, with its cable and its gateway, whose tenants come back by themselves."""
    member.power_on()
    member.plug()
    member.ours("all", **_SERVE)


@pytest.fixture(scope="module")
def serving(cluster: Rig) -> Iterator[tuple[Member, ...]]:
    """The members, with gateways that bring tenants back; afterwards they are as before."""

    def anew(step: Callable[[Member], None]) -> None:
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda member: member.ours("ungateway"), cluster.members):
                pass
            for _ in pool.map(step, cluster.members):
                pass

    anew(serve)
    yield cluster.members
    anew(heal)


@pytest.fixture
async def members(cluster: Rig, serving: tuple[Member, ...]) -> AsyncIterator[tuple[Member, ...]]:
    yield serving
    await asyncio.gather(*(asyncio.to_thread(serve, member) for member in serving))
    for one in json.loads(cluster.first.incus("list", "--all-projects", "--format=json")):
        if one["project"] == "gateway-recovered":
            await until(functools.partial(deleted, cluster.first, one["project"], one["name"]), 60, every=1)


async def deleted(member: Member, project: str, tenant: str) -> bool:
    """Delete an instance; return whether that was possible: its gateway may just be copying it."""
    try:
        await asyncio.to_thread(member.incus, "delete", "--force", "--project", project, tenant)
    except HostError as error:
        return "not found" in error.message.lower()
    return True


async def inside(gateway: Served, path: str, body: Any = None, patience: float = 5) -> tuple[int, Any]:
    """Ask a member's gateway from its own side of the cable; 0 stands for no answer in time."""
    words = ["curl", "--silent", "--max-time", str(patience), "--write-out", "\n%{http_code}"]
    words += ["--header", f"Authorization: Bearer {gateway.token('*')}"]
    if body is not None:
        words += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
    try:
        said = await asyncio.to_thread(gateway.member.run, *words, f"http://127.0.0.1:8080{path}")
    except HostError:
        return 0, None
    text, _, status = said.rpartition("\n")
    return int(status), json.loads(text) if text else None


async def runs(gateway: Served, tenant: str) -> int:
    """Return the status of a command, asked on the member's own side."""
    return (await inside(gateway, f"/v1/tenants/{tenant}/exec", {"argv": ["true"]}))[0]


def frozen(member: Member, tenant: str) -> bool:
    """Return whether a container's cgroup is, independently of the code under test."""
    found = f"find /sys/fs/cgroup -maxdepth 2 -name lxc.payload.{tenant}"
    script = f"for group in $({found}); do cat $group/cgroup.freeze 2>/dev/null; done; true"
    return "1" in member.run("sh", "-c", script)


# each start of it has another page
_SITE: Final = """
set -e
mkdir -p /srv/site
cat >/srv/page.py <<'PY'
import functools, http.server, socketserver
# not `python3 -m http.server`, which asks for its own name first, ten seconds without a resolver
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/srv/site")
socketserver.TCPServer(("", 3000), handler).serve_forever()
PY
cat >/etc/systemd/system/page.service <<'UNIT'
[Service]
ExecStartPre=/bin/sh -c 'date +%%s%%N >/srv/site/index.html'
ExecStart=/usr/bin/python3 /srv/page.py
[Install]
WantedBy=multi-user.target
UNIT
systemctl daemon-reload
systemctl enable --now page
"""


async def site(gateway: Served, tenant: str) -> str:
    """Give a tenant a site that starts with it, and return its domain once it is there."""
    domain, home = f"{tenant}.example.com", gateway.member
    await until(lambda: booted(gateway, tenant), 60, every=0.2)
    home.incus("config", "set", tenant, f"user.gateway.domain={domain}", "user.gateway.port=3000")
    await asyncio.to_thread(home.incus, "exec", tenant, "--", "sh", "-c", _SITE)
    await until(lambda: served(gateway, domain), 60, every=0.3)
    return domain


async def back(gateway: Served, tenant: str) -> bool:
    """Return whether a command runs; what is under way when a server dies breaks off."""
    try:
        return await booted(gateway, tenant)
    except aiohttp.ClientError:
        return False


async def served(gateway: Served, domain: str) -> bool:
    """Return whether a site answers within a second: while it starts, a connection to it may hang."""
    words = ["curl", "--silent", "--fail", "--max-time", "1", "--output", "/dev/null"]
    try:
        at = "http://127.0.0.1:2020/"
        await asyncio.to_thread(gateway.member.run, *words, "--header", f"Host: {domain}", at)
    except HostError:
        return False
    return True


def instances(member: Member, tenant: str) -> list[tuple[str, str]]:
    """Return member and project of each instance that is a tenant of that name, or was."""
    found = json.loads(member.incus("list", "--all-projects", "--format=json", tenant))
    live = [one for one in found if one["name"] == tenant and one["project"] != "gateway-standby"]
    return [(one["location"], one["project"]) for one in live]


async def test_a_member_that_is_cut_off_freezes_its_tenants_that_others_have_copies_of(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    """And those alone; they run on as they were once it is back, and nobody else has them."""
    first = leader(members)
    cut = client(next(member for member in members if member is not first))
    copy, plain = await make_tenant(cut.member), await make_tenant(cut.member)
    for tenant in (copy, plain):
        await until(lambda: booted(cut, tenant), 60, every=0.2)  # noqa: B023 - awaited at once
    await write(cut, copy, "a.txt", "one")
    await asyncio.to_thread(cut.member.incus, "config", "set", copy, "user.gateway.standby=3600")
    await copied(cut, copy)
    await asyncio.to_thread(cut.member.unplug)
    began = time.monotonic()
    answered = began
    while time.monotonic() < began + LEASE + 15:
        asked = time.monotonic()
        status, said = await inside(cut, f"/v1/tenants/{copy}/exec", {"argv": ["true"]})
        if status == 200:
            answered = asked
        elif status == 503 and said["reason"] == "member_away":
            break
        await pause(0.2)
    print(f"the last call was answered {answered - began:.1f} s after the cut")
    assert status == 503 and answered - began < LEASE + 1
    await until(lambda: frozen(cut.member, copy), 5, every=0.2)
    assert not frozen(cut.member, plain)
    assert await runs(cut, copy) == 503
    await asyncio.to_thread(cut.member.plug)
    began = time.monotonic()
    await until(lambda: booted(cut, copy), 30, every=0.2)
    print(f"it answered again {time.monotonic() - began:.1f} s after the cable was in")
    assert not frozen(cut.member, copy)
    other, said = client(first), dict[str, Any]()

    async def heard() -> bool:  # of the member, which may have its lease before
        status, answer = await other.ask("GET", f"/v1/tenants/{copy}")
        said.update(answer)
        return status == 200

    await until(heard, 30, every=0.2)
    assert said["location"] == cut.member.name


@pytest.mark.parametrize("leads", [False, True], ids=["a member that does not lead", "the leader"])
async def test_tenants_of_a_server_without_power_are_back_elsewhere_within_half_a_minute(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant, leads: bool
) -> None:
    """With their site, files and commands; others see no error, and there is one of each when it returns."""
    first = leader(members)
    dead = first if leads else next(member for member in members if member is not first)
    home, *living = (client(member) for member in (dead, *(one for one in members if one is not dead)))
    tenant, plain, other = (
        await make_tenant(dead),
        await make_tenant(dead),
        await make_tenant(living[0].member),
    )
    domain = await site(home, tenant)
    for gateway, name in ((home, plain), (living[0], other)):
        await until(lambda: booted(gateway, name), 60, every=0.2)  # noqa: B023 - awaited at once
    await write(home, tenant, "a.txt", "before the end")
    await asyncio.to_thread(dead.incus, "config", "set", tenant, "user.gateway.standby=3600")
    copy = await copied(home, tenant)
    calls = Calls()
    calling = asyncio.create_task(commands(living[0], other, calls))
    try:
        await asyncio.to_thread(dead.cut_power)
        began = time.monotonic()
        await until(lambda: back(living[1], tenant), 60, every=0.2)
        called = time.monotonic() - began
        await until(lambda: served(living[0], domain), 30, every=0.2)
        print(f"commands after {called:.1f} s, site after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < 35  # 30 where members do not share two cores
        assert "before the end" in await read(living[0], tenant, "a.txt")
        for gateway in living:
            assert await served(gateway, domain), gateway.member.name
            status, said = await gateway.ask("GET", f"/v1/tenants/{tenant}")
            assert (status, said["location"]) == (200, copy["member"])
            status, said = await gateway.ask("GET", f"/v1/tenants/{plain}")
            assert (status, said.get("reason")) == (503, "member_away")
        assert ("tenant.recovered", tenant, copy["member"]) in await events(living[0])
        new_home = next(gateway.member for gateway in living if gateway.member.name == copy["member"])
        assert host_uids(new_home, tenant, "gateway-recovered")[1] == 65536
        # and it leaves room for others there
        later = await make_tenant(new_home)
        assert not shared(host_uids(new_home, later), host_uids(new_home, tenant, "gateway-recovered"))
    finally:
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
    assert set(calls.statuses) == {200}
    page = (await living[0].visit(domain))[1]
    await asyncio.to_thread(serve, dead)
    new = copy["member"]

    def one() -> bool:
        return instances(dead, tenant) == [(new, "gateway-recovered")]

    await until(one, 60, every=0.5)
    await until(lambda: booted(living[0], plain), 60, every=0.2)
    for gateway in (home, *living):
        await until(lambda: booted(gateway, tenant), 30, every=0.2)  # noqa: B023 - awaited at once
        await until(lambda: shows(gateway, domain, page), 30, every=0.3)  # noqa: B023 - awaited at once


def host_uids(member: Member, tenant: str, project: str = "default") -> tuple[int, int]:
    """Return the first of the host's uids that a running tenant has, and how many there are."""
    found = member.query(f"/1.0/instances/{tenant}?project={project}")["config"]["volatile.idmap.current"]
    return next((one["Hostid"], one["Maprange"]) for one in json.loads(found) if one["Isuid"])


def shared(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


async def shows(gateway: Served, domain: str, page: str) -> bool:
    return await gateway.visit(domain) == (200, page)


async def test_a_cut_cable_never_lets_two_answer(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    """On both of its sides a visitor and a client ask all the while."""
    first = leader(members)
    dead = next(member for member in members if member is not first)
    cut, living = client(dead), client(first)
    tenant = await make_tenant(dead)
    domain = await site(cut, tenant)
    await asyncio.to_thread(dead.incus, "config", "set", tenant, "user.gateway.standby=3600")
    await copied(cut, tenant)
    begins = ["awk", "{ print $22 }", "/proc/1/stat"]  # when a container was started
    _, began = await inside(cut, f"/v1/tenants/{tenant}/exec", {"argv": begins})
    old = {(await cut.visit(domain))[1], began["stdout"]}
    said: list[tuple[str, float, float, str]] = []

    async def visit(gateway: Served) -> None:
        while True:
            began = time.monotonic()
            status, text = await gateway.visit(domain)
            if status == 200:
                said.append((gateway.member.name, began, time.monotonic(), text))
            await pause(0.3)

    async def call(gateway: Served) -> None:
        while True:
            began = time.monotonic()
            status, answer = await inside(gateway, f"/v1/tenants/{tenant}/exec", {"argv": begins})
            if status == 200 and answer["exit_code"] == 0:
                said.append((gateway.member.name, began, time.monotonic(), answer["stdout"]))
            await pause(0.3)

    await asyncio.to_thread(dead.unplug)
    out = time.monotonic()
    asking = [asyncio.create_task(work(gateway)) for work in (visit, call) for gateway in (cut, living)]
    try:

        def there() -> bool:
            return {name for name, *_, text in said if text not in old} == {first.name} and len(said) > 3

        await until(there, 60, every=0.2)
        await pause(10)
        await asyncio.to_thread(dead.plug)
        await until(lambda: instances(first, tenant)[1:] == [], 60, every=0.5)
        await pause(10)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    before = [end for _, _, end, text in said if text in old]
    after = [begun for _, begun, _, text in said if text not in old]
    print(f"the old one answered until {max(before) - out:.1f} s, the new one from {min(after) - out:.1f} s")
    assert max(before) < min(after), "no one of them answers after the other one has begun to"
    assert len({text for *_, text in said}) == 4, "a page and a start of each"
    assert dead.name in {name for name, *_, text in said if text not in old}, (
        "it leads to the new home by now"
    )


async def test_a_tenant_that_nobody_took_over_is_started_with_its_server(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    """By the gateway, once it is certain that it runs nowhere else: Incus itself leaves it alone."""
    first = leader(members)
    dead = next(member for member in members if member is not first)
    home, tenant = client(dead), await make_tenant(dead)
    await until(lambda: booted(home, tenant), 60, every=0.2)
    await write(home, tenant, "a.txt", "one")
    await asyncio.to_thread(dead.incus, "config", "set", tenant, "user.gateway.standby=3600")
    copy = await copied(home, tenant)
    assert dead.query(f"/1.0/instances/{tenant}")["config"]["boot.autostart"] == "false"
    has = next(member for member in members if member.name == copy["member"])
    for member in (has, dead):
        await asyncio.to_thread(member.cut_power)
    await asyncio.to_thread(serve, dead)
    await until(lambda: back(home, tenant), 60, every=0.2)
    await asyncio.to_thread(serve, has)
    assert instances(dead, tenant) == [(dead.name, "default")]
    await asyncio.to_thread(dead.incus, "config", "set", tenant, "user.gateway.standby=0")

    def as_before() -> bool:
        return "boot.autostart" not in dead.query(f"/1.0/instances/{tenant}")["config"]

    await until(as_before, 60, every=0.5)
