"""`move`, `cluster drain` and `cluster restore`: which tenants go where, some at a time, whoever fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.cli import cluster as commands
from gateway.cli.invocation import Failed
from gateway.errors import NotFound, Unavailable
from gateway.host import cluster as members


class Cluster:
    """Three members with tenants: what a client of any gateway sees."""

    def __init__(self, **locations: str) -> None:
        self.locations = locations
        self.moves: dict[str, dict[str, Any]] = {}
        self.stuck: set[str] = set()
        self.late: list[tuple[str, str]] = []  # tenants that come when all others were looked at
        self.drained: list[tuple[str, bool]] = []
        self.running = self.most = 0

    async def tenants(self) -> list[Any]:
        found = [SimpleNamespace(name=name, all={"location": at}) for name, at in self.locations.items()]
        if self.late:
            name, at = self.late.pop()
            self.locations[name] = at
        return found

    def tenant(self, name: str) -> Any:
        async def move(member: str | None = None, *, drained: bool = False) -> Mapping[str, Any]:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0)
            self.running -= 1
            if name in self.stuck:
                raise Unavailable("there is no room")
            before, to = self.locations[name], member or ("m2" if self.locations[name] != "m2" else "m3")
            self.locations[name] = to
            told = {"tenant": name, "from": before, "to": to, "state": "moved", "drained": drained}
            self.moves[name] = told | {"gap_ms": None if drained else 2500}
            return self.moves[name]

        async def last_move() -> Mapping[str, Any]:
            if name not in self.moves:
                raise NotFound("it was never moved")
            return self.moves[name]

        return SimpleNamespace(move=move, last_move=last_move)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster(a="m1", b="m1", c="m1", d="m2")

    @contextlib.asynccontextmanager
    async def client_of(*_: Any) -> AsyncIterator[Cluster]:
        yield found

    def set_drained(_: Any, name: str, drained: bool) -> None:
        found.drained.append((name, drained))

    monkeypatch.setattr(commands, "client_of", client_of)
    monkeypatch.setattr("gateway.cli.invocation.client_of", client_of)
    monkeypatch.setattr(commands, "_SETTLE", 0.0)
    monkeypatch.setattr(members, "set_drained", set_drained)
    return found


def test_a_tenant_is_moved(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    commands.move("a", "m3")
    assert cluster.locations["a"] == "m3"
    assert capsys.readouterr().out == "a is on m3, after 2.5 s\n"


def test_a_drained_member_is_left_by_all_also_by_one_that_came_late(cluster: Cluster) -> None:
    cluster.late = [("late", "m1")]
    commands.drain("m1")
    assert "m1" not in cluster.locations.values() and cluster.locations["d"] == "m2"
    assert cluster.drained == [("m1", True)]
    assert cluster.most == 2


def test_a_drain_goes_on_where_one_fails_and_says_which(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.stuck = {"a"}
    with pytest.raises(Failed, match="not moved: a;"):
        commands.drain("m1")
    assert {name for name, at in cluster.locations.items() if at == "m1"} == {"a"}
    assert "a is not moved: there is no room" in capsys.readouterr().err
    cluster.stuck = set()
    commands.drain("m1")
    assert "m1" not in cluster.locations.values()


def test_a_restored_member_gets_back_those_that_were_drained_and_no_others(cluster: Cluster) -> None:
    commands.move("c", "m3")  # by hand, so that it stays there
    commands.drain("m1")
    commands.restore("m1")
    assert cluster.locations == {"a": "m1", "b": "m1", "c": "m3", "d": "m2"}
    assert cluster.drained == [("m1", True), ("m1", False)]
    cluster.moves["d"] = {"from": "m3", "to": "m2", "state": "moved", "drained": True}
    commands.restore("m1")
    assert cluster.locations["d"] == "m2"
