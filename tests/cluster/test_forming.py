"""Clusters as an operator forms, changes and mends them; the tests' own is formed by the same commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.host import HostError
from tests.cluster.conftest import Served
from tests.cluster.rig import CHECKOUT, PORT, Member, Rig
from tests.cluster.test_dying import booted
from tests.integration.environment import HOST
from tests.live import SECRET
from tests.waits import until, until_true

pytestmark = [pytest.mark.timeout(340), pytest.mark.thorough]


def command(member: Member, *words: str, check: bool = True) -> str:
    """Run `incus-gateway` of this checkout in a member."""
    try:
        return member.run(
            *("env", f"--chdir={CHECKOUT}", sys.executable, "-m", "gateway", *words),
            PYTHONPATH=f"{CHECKOUT}:{CHECKOUT}/clients/python",
            GATEWAY_SECRET=SECRET,
            timeout=300,
        )
    except HostError as error:
        if check:
            raise
        return error.message


def quickstart(member: Member, *options: str) -> str:
    """Do as `deploy/quickstart` does once packages and environment are there."""
    words = [sys.executable, "-m", "gateway.host.quickstart", "start", str(CHECKOUT), "tests", *options]
    return member.run(
        *("env", f"--chdir={CHECKOUT}", *words),
        timeout=300,
        PYTHONPATH=f"{CHECKOUT}:{CHECKOUT}/clients/python",
        GATEWAY_LISTEN=f"0.0.0.0:{PORT}",
        GATEWAY_CADDY_ISSUER="internal",
        GATEWAY_TENANT_DISK="2GiB",
        GATEWAY_TENANT_MEMORY="512MiB",
        GATEWAY_SECRET=SECRET,
    )


def listed(member: Member) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(command(member, "cluster", "list", "--json"))}


@pytest.fixture
def fourth(cluster: Rig) -> Iterator[Member]:
    """A server beside the cluster, with nothing on it."""
    member = Member(cluster, len(cluster.members) + 1)
    member.remove()
    member.power_on()
    yield member
    member.remove()
    if member.name in listed(cluster.first):
        cluster.first.incus("cluster", "remove", member.name, "--force", "--yes")


def test_an_empty_server_joins_by_one_command_and_is_removed_when_it_is_lost(
    cluster: Rig, fourth: Member
) -> None:
    first = cluster.first
    token = command(first, "cluster", "add", fourth.name).strip()
    said = quickstart(fourth, "--join", token)
    assert f"on the member {fourth.name} of the cluster" in said
    assert fourth.run("curl", "-sf", "http://127.0.0.1:8080/readyz") == '{"status":"ready"}'
    assert listed(fourth)[fourth.name] == {
        "name": fourth.name,
        "address": f"{fourth.address}:8443",
        "status": "Online",
        "message": "Fully operational",
        "roles": listed(first)[fourth.name]["roles"],
        "own": True,
        "drained": False,
    }
    again = quickstart(fourth)  # as after a change of settings
    assert f"on the member {fourth.name} of the cluster" in again
    assert "gateway: already running" in again

    fourth.cut_power()
    refused = command(first, "cluster", "remove", fourth.name, check=False)
    assert fourth.name in listed(first), refused
    remove_dead(first, fourth.name)
    assert fourth.name not in listed(first)


def remove_dead(member: Member, name: str) -> str:
    """Remove a member that was switched off, as soon as Incus takes it for dead."""
    until_true(lambda: listed(member)[name]["status"] != "Online", 60, every=0.5)
    return command(member, "cluster", "remove", name, "--force", "--yes")


@pytest.fixture
def pair() -> Iterator[Rig]:
    """A cluster of two of its own, of which one is the only voter."""
    rig = Rig(2, HOST + 1)
    rig.down(print)
    rig.up(print)
    yield rig
    rig.down(print)


async def test_the_other_of_two_goes_on_alone_and_the_lost_voter_serves_nothing_when_it_returns(
    pair: Rig,
) -> None:
    """The voter has a quorum in its own database, where it still is a member: the other one tells it."""
    voter, other = pair.members
    for member in pair.members:
        member.ours("gateway")
    for name, home in (("shop", other), ("lost", voter)):
        home.incus("launch", "gateway-base", name, "--profile", "gateway-tenant", "--target", home.name)
    pid = other.query("/1.0/instances/shop/state")["pid"]
    voter.incus("config", "set", "lost", "user.gateway.standby=1")

    async def has_copy() -> bool:
        status, said = await Served(voter).ask("GET", "/v1/tenants/lost")
        return status == 200 and bool(said["standby"])

    await until(has_copy, 120, every=0.5)
    voter.incus("config", "set", "lost", "user.gateway.standby=3600")
    voter.cut_power()
    with pytest.raises(HostError):
        other.incus("list", timeout=15)  # nothing is answered
    said = command(other, "cluster", "list", check=False)
    assert "cluster recover-from-quorum-loss" in said
    command(other, "cluster", "recover-from-quorum-loss", "--yes")

    def decides() -> bool:
        try:
            other.incus("project", "set", "default", "user.note=1", timeout=20)
        except HostError:
            return False
        return True

    until_true(decides, 60, every=1)
    assert other.query("/1.0/instances/shop/state")["pid"] == pid  # it ran on
    said = remove_dead(other, voter.name)
    assert "lost is back on" in said, said
    assert [*listed(other)] == [other.name]
    await until(lambda: booted(Served(other), "lost"), 60, every=0.5)

    voter.power_on()
    with pytest.raises(HostError, match="was removed from the cluster"):  # its gateway is never ready
        voter.ours("all")
    assert voter.query("/1.0/cluster/members?recursion=1"), "its own database answers"
    back = Served(voter)

    async def refuses() -> bool:
        status, said = await back.ask("GET", "/v1/tenants")
        return status == 503 and "was removed from the cluster" in said["detail"]

    await until(refuses, 30, every=0.2)
    body = {"file_path": "/srv/site/a.txt", "content": "by the removed one"}
    for method, path, given in (
        ("GET", "/readyz", None),
        ("POST", "/v1/tenants/lost/tools/Write", body),
        ("POST", "/v1/tenants/lost/exec", {"argv": ["true"]}),
    ):
        status, said = await back.ask(method, path, given)
        assert status == 503, (path, said)
    assert voter.query("/1.0/instances/lost")["status"] == "Stopped", "it was never started there"
    assert await booted(Served(other), "lost")
