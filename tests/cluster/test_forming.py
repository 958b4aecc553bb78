"""Clusters as an operator forms, changes and mends them; the tests' own is formed by the same commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.host import HostError
from tests.cluster.rig import CHECKOUT, PORT, Member, Rig
from tests.integration.environment import HOST
from tests.waits import until_true

pytestmark = [pytest.mark.timeout(340), pytest.mark.thorough]


def command(member: Member, *words: str, check: bool = True) -> str:
    """Run `incus-gateway` of this checkout in a member."""
    try:
        return member.run(
            *("env", f"--chdir={CHECKOUT}", sys.executable, "-m", "gateway", *words),
            PYTHONPATH=f"{CHECKOUT}:{CHECKOUT}/clients/python",
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
        GATEWAY_SECRET="a secret of the tests, long enough to sign with",
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
        command(cluster.first, "cluster", "remove", member.name, "--force", "--yes")


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
    command(first, "cluster", "remove", fourth.name, "--force", "--yes")
    assert fourth.name not in listed(first)


@pytest.fixture
def pair() -> Iterator[Rig]:
    """A cluster of two of its own, of which one is the only voter."""
    rig = Rig(2, HOST + 1)
    rig.down(print)
    rig.up(print)
    yield rig
    rig.down(print)


def test_the_other_of_two_goes_on_alone_after_the_voter_is_lost(pair: Rig) -> None:
    voter, other = pair.members
    other.incus("launch", "gateway-base", "shop", "--profile", "gateway-tenant", "--target", other.name)
    pid = other.query("/1.0/instances/shop/state")["pid"]
    voter.cut_power()
    with pytest.raises(HostError):
        other.incus("list", timeout=15)  # nothing is answered
    command(other, "cluster", "recover", "--yes")

    def decides() -> bool:
        try:
            other.incus("project", "set", "default", "user.note=1", timeout=20)
        except HostError:
            return False
        return True

    until_true(decides, 60, every=1)
    assert other.query("/1.0/instances/shop/state")["pid"] == pid  # it ran on
    command(other, "cluster", "remove", voter.name, "--force", "--yes")
    assert [*listed(other)] == [other.name]
