"""The members of a cluster, as incusd answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.incus import Incus, IncusError
from gateway.incus.members import Member, Membership


class Scripted(Incus):
    """An incusd with one member of its own in `config`, and as many changes by others as `before`."""

    def __init__(self, *, clustered: bool = True, before: int = 0) -> None:
        super().__init__(Path("/nonexistent"))
        self.clustered, self.before = clustered, before
        self.config = {"scheduler.instance": "all", "user.gateway.peer": "10.90.0.2:8444"}
        self.roles = ["database"]
        self.asked: list[str] = []

    def entry(self, name: str, number: int) -> dict[str, Any]:
        own = {"config": self.config, "roles": self.roles, "groups": ["default"]}
        other = {"config": {}, "roles": ["database"], "groups": ["default"]}
        return {
            "server_name": name,
            "url": f"https://10.90.0.{number}:8443",
            "status": "Online" if name == "m2" else "Offline",
            "failure_domain": "default",
            "description": "",
        } | (own if name == "m2" else other)

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        if_match: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        self.asked.append(f"{method} {path}")
        tag = str(sorted(self.config.items()))
        metadata: Any = {}
        match method, path:
            case "GET", "/1.0":
                # one that is not clustered has a name as well, its host's
                metadata = {"environment": {"server_clustered": self.clustered, "server_name": "m2"}}
            case "GET", "/1.0/cluster/members":
                metadata = [self.entry("m2", 2), self.entry("m1", 1)]
            case "GET", "/1.0/cluster/members/m2":
                metadata = self.entry("m2", 2)
                if self.before:
                    self.before -= 1
                    self.config = {**self.config, "user.other": str(self.before)}
            case "PATCH", "/1.0/cluster/members/m2":
                assert body is not None
                if if_match != tag:
                    raise IncusError("ETag doesn't match", 412)
                assert body["groups"], "Cluster members need to belong to at least one group"
                self.roles = body["roles"]
                self.config = {key: value for key, value in body["config"].items() if value}
            case _:
                raise AssertionError(f"{method} {path}")
        return {"type": "sync", "metadata": metadata, "etag": tag}


async def test_without_a_cluster_there_is_one_member_without_a_name() -> None:
    incus = Scripted(clustered=False)
    assert await Membership(incus).own() == ""
    assert await Membership(incus).members() == (Member(""),)
    assert set(incus.asked) == {"GET /1.0"}
    with pytest.raises(ValueError, match="no cluster"):
        await Membership(incus).publish({"user.gateway.peer": "x"})


async def test_the_members_have_the_keys_of_their_gateways_alone() -> None:
    first, second = await Membership(Scripted()).members()
    assert first == Member("m1", "10.90.0.1:8443")
    assert second == Member("m2", "10.90.0.2:8443", {"user.gateway.peer": "10.90.0.2:8444"})
    assert await Membership(Scripted()).own() == "m2"


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("10.90.0.1:8443", "10.90.0.1"),
        ("[fd00::1]:8443", "fd00::1"),
        ("one.example:8443", "one.example"),
        ("", ""),
    ],
)
def test_a_member_is_reached_at_its_host(address: str, host: str) -> None:
    assert Member("m1", address).host == host


async def test_what_is_published_leaves_all_else_as_it_was() -> None:
    """Also what others set at the same moment."""
    incus = Scripted(before=2)
    await Membership(incus).publish({"user.gateway.addresses": "192.0.2.1", "user.gateway.peer": ""})
    assert incus.config == {
        "scheduler.instance": "all",
        "user.other": "0",
        "user.gateway.addresses": "192.0.2.1",
    }
    assert incus.roles == ["database"]


async def test_what_is_published_already_changes_nothing() -> None:
    incus = Scripted()
    await Membership(incus).publish({"user.gateway.peer": "10.90.0.2:8444", "user.gateway.addresses": ""})
    assert not any(asked.startswith("PATCH") for asked in incus.asked)


async def test_a_change_that_others_always_come_before_fails() -> None:
    with pytest.raises(IncusError) as caught:
        await Membership(Scripted(before=100)).publish({"user.gateway.peer": "x"})
    assert caught.value.status == 412
