"""Preparing a host that is a member of a cluster; `tests/cluster` does the same to a real one."""

from __future__ import annotations

import builtins
import socket
import time
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from gateway.host import HostError, checks
from gateway.host.cluster import cluster_problems, member_rows
from gateway.host.incus import IncusAdmin
from gateway.host.requirements import doctor
from gateway.host.setup import ADDRESSES, addresses_published, all_addresses, create_on_all, is_pending
from gateway.runtime.incus.standby_copies import tell_late
from gateway.settings import Settings


class Servers(IncusAdmin):
    """The incusd of m1, in a cluster of `names` unless that is empty."""

    def __init__(self, *names: str) -> None:
        self.names_, self.posted = names, list[tuple[str, str, Mapping[str, Any]]]()
        self.objects: dict[tuple[str, ...], dict[str, Any]] = {}
        self.config: dict[str, str] = {}
        self.published: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.away: set[str] = set()

    def get(self, *path: str, target: str = "") -> dict[str, Any]:
        if target in self.away:
            raise HostError(f"{target} does not answer")
        if not path:
            name = target or "m1"
            version = self.versions.get(name, "6.0.4")
            environment = {"server_clustered": bool(self.names_), "server_name": name}
            return {"environment": {**environment, "server_version": version}, "config": self.config}
        up = {"state": "up", "status": "Created"}
        return self.objects.get((*path, target), up)

    def find(self, *path: str) -> dict[str, Any] | None:
        return self.objects.get(path)

    def list(self, *path: str) -> builtins.list[dict[str, Any]]:
        assert path == ("cluster", "members")
        return [
            {
                "server_name": name,
                "status": "Offline" if name in self.away else "Online",
                "message": "No heartbeat for 30s" if name in self.away else "Fully operational",
                "config": {ADDRESSES: self.published[name]} if name in self.published else {},
            }
            for name in self.names_
        ]

    def post(self, *path: str, **request: Any) -> dict[str, Any]:
        target = (request.get("params") or {}).get("target", "")
        self.posted.append((path[0], target, request["json"]["config"]))
        return {}


POOL = {"name": "gateway", "driver": "btrfs", "config": {"size": "8GiB"}}
BRIDGE = {"name": "gatewaybr0", "type": "bridge", "config": {"ipv4.address": "10.82.0.1/20"}}


def test_without_a_cluster_a_pool_is_created_as_it_is() -> None:
    incus = Servers()
    create_on_all(incus, "storage-pools", POOL, own=("size",))
    assert incus.posted == [("storage-pools", "", {"size": "8GiB"})]


def test_in_a_cluster_each_member_is_told_first_and_only_what_is_its_own() -> None:
    """Else Incus says "not pending on any node", or "config key may not be used in this request"."""
    incus = Servers("m1", "m2")
    create_on_all(incus, "storage-pools", POOL, own=("size",))
    create_on_all(incus, "networks", BRIDGE)
    assert incus.posted == [
        ("storage-pools", "m1", {"size": "8GiB"}),
        ("storage-pools", "m2", {"size": "8GiB"}),
        ("storage-pools", "", {}),
        ("networks", "m1", {}),
        ("networks", "m2", {}),
        ("networks", "", {"ipv4.address": "10.82.0.1/20"}),
    ]


def test_what_an_interrupted_run_announced_is_not_announced_again() -> None:
    incus = Servers("m1", "m2", "m3")
    incus.objects["networks", "gatewaybr0"] = {"status": "Pending", "locations": ["m1", "m2"]}
    assert is_pending(incus.find("networks", "gatewaybr0"))
    create_on_all(incus, "networks", BRIDGE)
    assert [target for _, target, _ in incus.posted] == ["m3", ""]


def test_tenants_are_kept_from_the_addresses_of_all_members() -> None:
    own = [IPv4Address("192.0.2.1")]
    assert all_addresses(Servers(), own) == own
    incus = Servers("m1", "m2", "m3")
    # m1's is of an earlier time
    incus.published = {"m1": "192.0.2.9", "m2": "192.0.2.2,192.0.2.3"}
    assert list(map(str, all_addresses(incus, own))) == ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    incus.published["m2"] = "anything"
    with pytest.raises(HostError, match="of m2 is not a list of addresses"):
        all_addresses(incus, own)


def test_addresses_are_published_only_where_others_do_not_know_them() -> None:
    own = [IPv4Address("192.0.2.1")]
    assert addresses_published(Servers(), own)
    incus = Servers("m1", "m2")
    assert not addresses_published(incus, own)
    assert addresses_published(incus, [])
    incus.published["m1"] = "192.0.2.1"
    assert addresses_published(incus, own)


def test_a_whole_cluster_of_three_has_no_problem() -> None:
    assert cluster_problems(Servers("m1", "m2", "m3"), Settings()) == ([], [])
    assert cluster_problems(Servers(), Settings()) == ([], [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda incus: incus.away.add("m3"), "m3 is Offline: No heartbeat for 30s"),
        (
            lambda incus: incus.versions.update(m2="6.0.5"),
            "versions of Incus differ (m1, m3: 6.0.4; m2: 6.0.5)",
        ),
        (
            lambda incus: incus.config.update({"cluster.healing_threshold": "30"}),
            "before Incus 6.0.6 healing takes down the bridge",
        ),
        (
            lambda incus: incus.objects.update({("storage-pools", "gateway", "m2"): {"status": "Errored"}}),
            "storage pool gateway of m2: it is Errored there",
        ),
        (
            lambda incus: incus.objects.update(
                {("networks", "gatewaybr0", "state", "m3"): {"state": "down"}}
            ),
            "bridge gatewaybr0 of m3: it is down there",
        ),
    ],
)
def test_the_doctor_says_what_is_wrong_with_a_cluster(change: Any, said: str) -> None:
    incus = Servers("m1", "m2", "m3")
    change(incus)
    wrong, better = cluster_problems(incus, Settings())
    assert (len(wrong), better) == (1, [])
    assert said in wrong[0]


def test_healing_is_fine_where_it_leaves_the_bridges_up() -> None:
    incus = Servers("m1", "m2", "m3")
    incus.config["cluster.healing_threshold"] = "30"
    incus.versions = dict.fromkeys(("m1", "m2", "m3"), "6.0.10")
    assert cluster_problems(incus, Settings()) == ([], [])


def test_the_doctor_hints_at_two_members_and_at_images_that_are_not_everywhere() -> None:
    _, better = cluster_problems(Servers("m1", "m2"), Settings())
    assert len(better) == 1
    assert "2 of 3 members" in better[0]
    _, better = cluster_problems(Servers("m1", "m2", "m3", "m4"), Settings())
    assert len(better) == 1
    assert "images are kept on 3 of 4 members" in better[0]


def test_without_a_quorum_doctor_and_list_answer_soon_and_name_the_way_out(tmp_path: Path) -> None:
    """Incusd takes each request then, and answers none for a minute."""
    files = {"incus_socket": tmp_path / "unix.socket", "caddy_admin": str(tmp_path / "none")}
    settings = Settings.model_validate({**files, "state_dir": tmp_path})
    (tmp_path / "cluster.crt").touch()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(settings.incus_socket))
        silent.listen()
        began = time.monotonic()
        (found,) = [one for one in doctor(settings) if one.what == "cluster"]
        assert time.monotonic() - began < 5
        assert not found.ok and "incus-gateway cluster recover" in found.detail
        with pytest.raises(HostError, match="cluster recover"):
            member_rows(settings)


def test_doctor_names_late_copies(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    tell_late(tmp_path, ["shop"])
    with pytest.raises(HostError, match="shop"):
        checks.standby_copies(settings)
    tell_late(tmp_path, ())
    assert checks.standby_copies(settings) == "none is late"
