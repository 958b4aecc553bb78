"""Setup and doctor on the members of a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.host import HostError
from gateway.host.setup import ADDRESSES
from tests.cluster.rig import Member, Rig

pytestmark = [pytest.mark.timeout(240), pytest.mark.thorough]

OTHER = {
    "GATEWAY_NETWORK": "gwother",
    "GATEWAY_NETWORK_IPV4": "10.81.0.1/24",
    "GATEWAY_POOL": "gwother",
    "GATEWAY_PROFILE": "gwother",
}
PUBLIC = "203.0.113.7"  # RFC 5737; nothing that setup keeps tenants from anyway


def closed(member: Member) -> str:
    """Return what tenants may not reach."""
    egress = member.query("/1.0/network-acls/gateway-tenant")["egress"]
    return next(str(rule["destination"]) for rule in egress if rule["action"] == "drop")


@pytest.fixture
def nothing_else(cluster: Rig) -> Iterator[None]:
    """Remove afterwards what a setup under other names made."""
    yield
    first = cluster.first
    for what in ("profile", "network", "storage", "network acl"):
        try:
            name = OTHER["GATEWAY_POOL"]
            first.incus(*what.split(), "delete", name)
        except HostError as error:
            assert "not found" in error.message.lower()


@pytest.mark.usefixtures("nothing_else")
def test_setup_makes_pool_and_bridge_on_each_member(cluster: Rig) -> None:
    """By one of them, for all; the next run, on another one, finds only what is each host's own to do."""
    first, second, third = cluster.members
    said = second.ours("setup", **OTHER)
    assert "created" in said
    for member in (first, second, third):
        state = first.query(f"/1.0/networks/gwother/state?target={member.name}")
        assert state["state"] == "up"
        assert first.query(f"/1.0/storage-pools/gwother?target={member.name}")["status"] == "Created"
        assert (member.state / "incus/storage-pools/gwother").is_dir()
    own = third.ours("setup", **OTHER)
    changed = [line for line in own.splitlines() if line.startswith("changed")]
    steps = [line.split(":")[0].split(None, 1)[1] for line in changed]
    assert steps == ["disk quotas", "addresses of gwother"], own
    again = third.ours("setup", **OTHER)
    assert not [line for line in again.splitlines() if line.startswith("changed")], again


def test_tenants_of_all_are_kept_from_each_members_addresses(cluster: Rig) -> None:
    first, _, third = cluster.members
    third.run("ip", "address", "add", f"{PUBLIC}/32", "dev", "lo")
    try:
        assert "do not know this host's addresses" in third.ours("doctor")
        assert "published" in third.ours("setup")
        assert f"{PUBLIC}/32" in closed(first)
        assert not [line for line in first.ours("setup").splitlines() if line.startswith("changed")]
        assert f"{PUBLIC}/32" in closed(first)
    finally:
        third.run("ip", "address", "del", f"{PUBLIC}/32", "dev", "lo")
    third.ours("setup")
    assert PUBLIC not in closed(first)


def findings(member: Member) -> dict[str, Any]:
    lines = [line.split(maxsplit=1) for line in member.ours("doctor").splitlines()]
    return {rest.split(":")[0]: (word, rest) for word, rest in lines}


def test_the_doctor_looks_at_all_members(cluster: Rig) -> None:
    first = cluster.first
    assert findings(first)["cluster"] == ("ok", "cluster: 3 members, all online")
    first.incus("config", "set", "cluster.healing_threshold", "30")
    try:
        word, said = findings(cluster.members[1])["cluster"]
        assert word == "problem"
        assert "takes down the bridge" in said
    finally:
        first.incus("config", "unset", "cluster.healing_threshold")


def test_a_member_keeps_what_others_publish(cluster: Rig) -> None:
    """Publishing changes one key, and leaves roles, groups and other keys alone."""
    first, second, _ = cluster.members
    first.incus("cluster", "set", second.name, "user.note=kept")
    try:
        before = first.query(f"/1.0/cluster/members/{second.name}")
        second.run("ip", "address", "add", f"{PUBLIC}/32", "dev", "lo")
        second.ours("setup")
        after = first.query(f"/1.0/cluster/members/{second.name}")
        assert after["config"] == {**before["config"], ADDRESSES: PUBLIC}
        assert json.dumps({**after, "config": {}}) == json.dumps({**before, "config": {}})
    finally:
        second.run("ip", "address", "del", f"{PUBLIC}/32", "dev", "lo")
        second.ours("setup")
        first.incus("cluster", "unset", second.name, "user.note")
