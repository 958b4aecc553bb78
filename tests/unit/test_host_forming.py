"""Forming a cluster; `tests/cluster` forms a real one by the same functions."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.host import HostError, cluster
from gateway.host.cluster import JoinToken
from gateway.settings import Settings

FACTS = {"server_name": "m2", "fingerprint": "ab", "addresses": ["127.0.0.1:8443"], "secret": "s"}


def token(**changes: Any) -> str:
    return base64.b64encode(json.dumps(FACTS | changes).encode()).decode()


class Server:
    """The incusd of one server, which is `member` of a cluster or in none."""

    def __init__(self, member: str = "", **there: list[dict[str, Any]]) -> None:
        self.member, self.there = member, there
        self.changed: list[tuple[str, Any]] = []
        self.config: dict[str, str] = {}

    def get(self, *path: str) -> dict[str, Any]:
        environment = {"server_clustered": bool(self.member), "server_name": self.member or "host"}
        return {"environment": environment, "config": self.config}

    def list(self, *path: str) -> Any:
        return self.there.get(path[-1].replace("-", "_"), [])

    def put(self, *path: str, json: Mapping[str, Any]) -> None:
        self.changed.append(("/".join(path), json))

    def patch(self, *path: str, json: Mapping[str, Any]) -> None:
        self.changed.append(("/".join(path), json))

    def delete(self, *path: str, **request: Any) -> None:
        self.changed.append(("/".join(path), request))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that has `forming` speak to a server."""

    def use(server: Server) -> Server:
        monkeypatch.setattr(cluster, "IncusAdmin", lambda *_, **__: server)
        return server

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return use


def silent(line: str) -> None:
    pass


def test_a_token_names_its_server_and_where_the_others_are() -> None:
    found = JoinToken.parse(token())
    assert (found.name, found.addresses) == ("m2", ["127.0.0.1:8443"])


@pytest.mark.parametrize(
    "text",
    ["", "m2", "{}", token(addresses=[]), token(addresses=None), token(server_name="../m2"), "bm8="],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(HostError, match="not a token"):
        JoinToken.parse(text)


@pytest.mark.parametrize(
    ("there", "what"),
    [
        ({"instances": [{"name": "shop"}]}, "instances of its own, shop"),
        ({"storage_pools": [{"name": "gateway"}]}, "storage-pools of its own, gateway"),
        ({"networks": [{"name": "gatewaybr0", "managed": True}]}, "networks of its own, gatewaybr0"),
    ],
)
def test_a_server_that_would_lose_anything_does_not_join(on: Any, there: Any, what: str) -> None:
    server = on(Server(**there))
    with pytest.raises(HostError, match=what):
        cluster.join_cluster(Settings(), token(), silent)
    assert server.changed == []


def test_an_empty_server_joins_by_its_own_address_and_with_a_pool_of_its_own(
    on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interfaces of the host that Incus lists do not count as its networks."""
    on(Server(networks=[{"name": "eth0", "managed": False}]))
    ran: list[Any] = []
    monkeypatch.setattr(cluster, "new_pool", lambda settings: ({"size": "9GiB"}, ""))

    def run(command: Any, *, given: str, **_: Any) -> str:
        ran.append((command, given))
        return ""

    monkeypatch.setattr(cluster, "run", run)
    cluster.join_cluster(Settings(), token(), silent)
    ((command, given),) = ran
    assert command == ["incus", "admin", "init", "--preseed"]
    assert json.loads(given)["cluster"] == {
        "enabled": True,
        "server_address": "127.0.0.1:8443",  # of the interface that leads to the others
        "cluster_token": token(),
        "member_config": [{"entity": "storage-pool", "name": "gateway", "key": "size", "value": "9GiB"}],
    }


def test_joining_again_is_done_and_joining_as_another_is_refused(on: Any) -> None:
    on(Server("m2"))
    said: list[str] = []
    cluster.join_cluster(Settings(), token(), said.append)
    assert "already" in said[0]
    with pytest.raises(HostError, match="already the member m2, not m3"):
        cluster.join_cluster(Settings(), token(server_name="m3"), said.append)


def test_a_cluster_begins_with_an_address_of_its_own(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = on(Server())
    monkeypatch.setattr(cluster, "in_use", lambda port, host: None)
    monkeypatch.setattr(cluster, "publish_addresses", lambda settings, incus, own: None)
    monkeypatch.setattr(cluster, "host_addresses", list)
    cluster.enable_cluster(Settings(), "m1", "fd00::1", silent)
    assert server.changed == [
        ("", {"config": {"core.https_address": "[fd00::1]:8443"}}),
        ("cluster", {"server_name": "m1", "enabled": True}),
    ]
    again = on(Server("m1"))
    cluster.enable_cluster(Settings(), "m1", "", silent)
    assert again.changed == []


@pytest.mark.parametrize(
    ("listens", "address", "changed"),
    [
        ("10.0.0.1:8443", "", None),
        ("10.0.0.1:9443", "", None),
        ("10.0.0.1:8443", "10.0.0.2", "10.0.0.2:8443"),
        (":8443", "", "10.0.0.9:8443"),
        ("[::]:8443", "", "10.0.0.9:8443"),
        ("", "", "10.0.0.9:8443"),
    ],
)
def test_where_incusd_listens_already_is_fine_if_others_reach_it_there(
    on: Any, monkeypatch: pytest.MonkeyPatch, listens: str, address: str, changed: str | None
) -> None:
    """Its own port is in use by itself."""
    server = on(Server())
    server.config["core.https_address"] = listens
    monkeypatch.setattr(cluster, "in_use", lambda port, host: "in use" if listens else None)
    monkeypatch.setattr(cluster, "local_address", lambda: "10.0.0.9")
    monkeypatch.setattr(cluster, "publish_addresses", lambda settings, incus, own: None)
    monkeypatch.setattr(cluster, "host_addresses", list)
    cluster.enable_cluster(Settings(), "m1", address, silent)
    patched = [change for path, change in server.changed if not path]
    assert patched == ([{"config": {"core.https_address": changed}}] if changed else [])
    assert server.changed[-1] == ("cluster", {"server_name": "m1", "enabled": True})


def test_without_the_command_incus_none_is_formed(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = on(Server())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(HostError, match="incus is not installed"):
        cluster.enable_cluster(Settings(), "m1", "127.0.0.1", silent)
    with pytest.raises(HostError, match="incus is not installed"):
        cluster.join_cluster(Settings(), token(), silent)
    assert server.changed == []


def test_a_member_is_removed_by_another_one_and_by_force_only_if_it_is_dead(
    on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = on(Server("m1"))
    states = {"m1": "Online", "m2": "Online", "m3": "Offline"}
    rows = [{"name": name, "status": status, "own": name == "m1"} for name, status in states.items()]
    monkeypatch.setattr(cluster, "member_rows", lambda settings: rows)
    for name, reason in (("m1", "itself"), ("m2", "online"), ("m4", "not a member")):
        with pytest.raises(HostError, match=reason):
            cluster.check_removable(Settings(), name, force=True)
    cluster.check_removable(Settings(), "m2", force=False)
    cluster.check_removable(Settings(), "m3", force=True)
    assert server.changed == []
    cluster.remove_member(Settings(), "m2", force=False)
    cluster.remove_member(Settings(), "m3", force=True)
    assert server.changed == [
        ("cluster/members/m2", {}),
        ("cluster/members/m3", {"params": {"force": "1"}}),
    ]


def test_without_a_cluster_nobody_is_added(on: Any, tmp_path: Path) -> None:
    on(Server())
    with pytest.raises(HostError, match="cluster enable"):
        cluster.add_member(Settings(incus_socket=tmp_path / "unix.socket"), "m2")
