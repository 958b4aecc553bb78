"""`cluster remove --force` and `cluster recover`: what they show first, and whom they bring back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.cli import cluster as commands
from gateway.cli.invocation import Failed
from gateway.host import HostError
from gateway.host import cluster as members


class Cluster:
    """m3 is dead and has `a`, `b` and `bare`, the last without a copy; a copy of m2's `theirs` is on m1."""

    def __init__(self) -> None:
        self.members = {"m1": "Online", "m2": "Online", "m3": "Offline"}
        self.homes = {"a": "m3", "b": "m3", "theirs": "m2"}
        self.failing: set[str] = set()
        self.recovered: list[str] = []

    async def tenants(self) -> list[Any]:
        found = {**self.homes, "bare": "m3"}
        return [SimpleNamespace(name=name, all={"location": at}) for name, at in found.items()]

    async def http(self, method: str, path: str, body: Any = None) -> Any:
        copies = {
            name: {
                **{"tenant": name, "home": home, "member": "m1", "of": "2026-12-01T00:00:00.000Z"},
                **{"lost_seconds": 185, "lost": home not in self.members},
            }
            for name, home in self.homes.items()
        }
        if (method, path) == ("GET", "/v1/standby-copies"):
            return {"copies": [*copies.values()], "unanswered": ["m3"]}
        assert (method, path) == ("POST", "/v1/standby-copies/recover")
        well = [name for name in body["tenants"] if name not in self.failing]
        self.recovered += well
        return {
            "recovered": [copies[name] for name in well],
            "failed": {name: "its name is taken" for name in body["tenants"] if name in self.failing},
        }

    def remove(self, _: Any, name: str, *, force: bool) -> None:
        assert force
        del self.members[name]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()

    @contextlib.asynccontextmanager
    async def client_of(*_: Any) -> AsyncIterator[Cluster]:
        yield found

    def rows(_: Any) -> list[Any]:
        return [
            {"name": name, "status": status, "own": name == "m1"} for name, status in found.members.items()
        ]

    monkeypatch.setattr(commands, "client_of", client_of)
    monkeypatch.setattr(members, "member_rows", rows)
    monkeypatch.setattr(members, "remove_member", found.remove)
    return found


def say(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    def confirm(question: str, otherwise: str) -> None:
        if not yes:
            raise Failed(f"{question}: {otherwise}")

    monkeypatch.setattr(commands, "confirm", confirm)


def test_a_dead_member_is_removed_and_its_tenants_come_back_once_that_is_confirmed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, False)
    with pytest.raises(Failed, match=r"2 tenants back.* 1 are lost.*nothing was removed"):
        commands.remove("m3", force=True)
    said = capsys.readouterr()
    assert "a                    from m3 to m1; its copy was made 3 min before m3 was last heard" in said.out
    assert "theirs" not in said.out and "bare: has no standby copy, and is lost for good" in said.err
    assert "m3" in cluster.members and not cluster.recovered
    say(monkeypatch, True)
    commands.remove("m3", force=True)
    assert "m3" not in cluster.members and cluster.recovered == ["a", "b"]
    assert "b is back on m1" in capsys.readouterr().out


def test_a_member_that_incus_shows_online_is_not_removed_by_force(cluster: Cluster) -> None:
    with pytest.raises(HostError, match="m2 is online"):
        commands.remove("m2", force=True, yes=True)
    assert "m2" in cluster.members


def test_only_tenants_of_removed_members_are_recovered(cluster: Cluster) -> None:
    with pytest.raises(Failed, match="m2, the server of theirs, is still a member"):
        commands.recover(["theirs"], yes=True)
    with pytest.raises(Failed, match="nobody has no standby copy"):
        commands.recover(["nobody"], yes=True)
    commands.recover(yes=True)
    assert not cluster.recovered
    del cluster.members["m3"]
    commands.recover(["b"], yes=True)
    assert cluster.recovered == ["b"]
    commands.recover(yes=True)
    assert cluster.recovered == ["b", "a", "b"]


def test_the_command_fails_where_one_does_not_come_back(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.failing = {"a"}
    with pytest.raises(Failed, match="incus-gateway cluster recover"):
        commands.remove("m3", force=True, yes=True)
    assert "a is not back: its name is taken" in capsys.readouterr().err
    assert cluster.recovered == ["b"]
