"""What gateways ask and tell one another: the secret that they have in common, and revoked tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.cluster import cluster as clusters
from gateway.cluster.cluster import ASK_SECRET, TELL_REVOKED, Cluster, joined
from gateway.cluster.identity import Identity
from gateway.cluster.keys import FolderMembers, Placements
from gateway.cluster.listener import Question
from gateway.cluster.peers import KEY, MemberAway, Peer
from gateway.incus.members import Member
from gateway.settings import Settings
from gateway.storage.store import Store
from tests.live import free_ports
from tests.shared_memory import MemoryKeys
from tests.waits import settled, until


@contextlib.asynccontextmanager
async def members(folder: Path, *names: str) -> AsyncIterator[list[Cluster]]:
    """Run the parts of these members that are for their peers; none listens yet."""
    (folder / "members").mkdir()
    for name in names:
        (folder / "members" / name).write_text("{}")
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for name in names:
            file = folder / "members" / name
            (folder / name).mkdir()
            settings = Settings(state_dir=folder / name, peer_listen=f"127.0.0.1:{free_ports(1)[0]}")
            found.append(await stack.enter_async_context(joined(name, FolderMembers(file), settings)))
        yield found


@contextlib.asynccontextmanager
async def listening(cluster: Cluster, folder: Path, questions: Mapping[str, Question]) -> AsyncIterator[None]:
    async def app(*_: Any) -> None:
        raise AssertionError("nothing is passed on")

    async def nothing(*_: Any) -> Any:
        return ()

    async with Store(folder / cluster.own) as store:
        async with cluster.open(app, store, nothing, nothing, {}, questions):
            yield


async def test_a_gateway_gets_the_secret_before_it_listens_itself(tmp_path: Path) -> None:
    """The others learn its certificate meanwhile, which it publishes."""

    async def secret(peer: Peer, what: Any) -> Any:
        assert peer.name == "m2"
        return {"secret": "s" * 40}

    async with (
        members(tmp_path, "m1", "m2") as (m1, m2),
        listening(m1, tmp_path, {ASK_SECRET: secret}),
    ):
        assert await m2.fetch_secret() == "s" * 40


async def test_where_nobody_gives_the_secret_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_FETCHING", 0.2)
    monkeypatch.setattr(clusters, "SETTLING", 0.2)
    async with members(tmp_path, "m1", "m2") as (_, m2):
        assert await m2.fetch_secret() is None


async def test_peers_are_told_of_a_revoked_token_and_who_is_away_is_named(tmp_path: Path) -> None:
    heard = list[Any]()

    async def revoked(peer: Peer, what: Any) -> Any:
        heard.append((peer.name, what))
        return {"closed": 3}

    async with (
        members(tmp_path, "m1", "m2", "m3") as (m1, m2, _),
        listening(m1, tmp_path, {TELL_REVOKED: revoked}),
        listening(m2, tmp_path, {}),
    ):
        await until(lambda: m2.alive("m1"))
        assert await m2.tell_revoked("t", 5.0) == (3, ["m3"])
        assert await m2.tell_revoked("u", math.inf) == (3, ["m3"])
    assert heard == [("m2", {"id": "t", "expires": 5.0}), ("m2", {"id": "u", "expires": None})]


async def test_a_new_tenants_home_is_what_the_cluster_chose(tmp_path: Path) -> None:
    async def names() -> set[str]:
        return {"m1", "m2", "m3"}

    keys = MemoryKeys()
    async with members(tmp_path, "m1", "m2") as (m1, m2):
        await until(lambda: "m1" in m2.peers.all)
        assert await m2.place("alone", "m2") == "m2"
        for cluster in (m1, m2):
            cluster.placements = Placements(keys, names)
        assert await m1.place("shop", "m1") == "m1"
        assert await m2.place("shop", "m2") == "m1"
        await Placements(keys, names).choose("new", "m3")
        with pytest.raises(MemberAway):
            await m2.place("new", "m2")


async def test_a_peer_that_comes_or_goes_is_noticed(tmp_path: Path) -> None:
    moved = list[bool]()
    async with members(tmp_path, "m1", "m2") as (m1, m2):
        m2.peers.moved = lambda: moved.append(m2.alive("m1"))
        async with listening(m1, tmp_path, {}), listening(m2, tmp_path, {}):
            await until(lambda: moved == [True])
            m2.peers.all["m1"].end()
            assert moved == [True, False]
    assert not m2.alive("m3") and m2.alive("m2")


class LateMembers(FolderMembers):
    """Those of an Incus that cannot say them before it is told to."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.known = asyncio.Event()
        self.asked = asyncio.Event()

    async def members(self) -> tuple[Member, ...]:
        self.asked.set()
        await self.known.wait()
        return await super().members()


async def test_peers_are_listened_for_as_soon_as_it_is_known_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However long that takes: without a quorum Incus does not say it, and then this is no failure."""
    monkeypatch.setattr(clusters, "SETTLING", 0.0)
    (tmp_path / "members").mkdir()
    (tmp_path / "members" / "m1").write_text("{}")
    late = LateMembers(tmp_path / "members" / "m1")
    settings = Settings(state_dir=tmp_path / "m1", peer_listen=f":{free_ports(1)[0]}")
    (tmp_path / "m1").mkdir()
    async with joined("m1", late, settings) as m1, listening(m1, tmp_path, {}):
        await late.asked.wait()
        await settled()
        assert "it starts again in" not in caplog.text
        late.known.set()

        async def published() -> bool:
            return any(KEY in one.config for one in await late.members())

        await until(published, 30)


async def test_who_takes_over_waits_for_a_dead_peer_before_the_other_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on its clients wait, and its peers, who would take it for away."""
    async with members(tmp_path, "m1", "m2") as (m1, _):
        certificate = Identity(tmp_path / "m2").certificate
        said = {"address": f"127.0.0.1:{free_ports(1)[0]}", "certificate": certificate}
        (tmp_path / "members" / "m2").write_text(json.dumps({KEY: json.dumps(said)}))
        await until(lambda: "m2" in m1.peers.all and m1.peers.all["m2"].address)
        monkeypatch.setattr(clusters, "SETTLING", 0.05)
        await m1.settle()
        monkeypatch.setattr(clusters, "SETTLING", 3600.0)
        async with listening(m1, tmp_path, {}):
            await asyncio.wait_for(m1.settle(), 10)
            await until(lambda: json.loads((tmp_path / "members" / "m1").read_text()))
