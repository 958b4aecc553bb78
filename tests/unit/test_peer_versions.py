"""Gateways of two versions side by side: each takes of the other what it knows, and does without the rest."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.cluster import cluster as clusters
from gateway.cluster import peers
from gateway.cluster.cluster import Cluster, Room
from gateway.cluster.listener import PROTOCOL
from gateway.cluster.peers import Known, MemberAway, OrderRefused, Peer, order
from gateway.errors import Conflict
from gateway.storage.store import Store
from tests.unit.test_cluster_common import members
from tests.waits import until


class Newer(Known):
    """A tenant as a later version tells it."""

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "colour": "red", "limits": {"memory": [1, 2]}}


@contextlib.asynccontextmanager
async def beside(
    folder: Path, facts: Mapping[str, Any], tenant: Known
) -> AsyncIterator[tuple[Cluster, Peer]]:
    """Yield our gateway and its peer of another version, which says these facts and has this tenant."""

    async def app(*_: Any) -> None:
        raise AssertionError("nothing is passed on")

    async def nothing(*_: Any) -> Any:
        return ()

    async def theirs(*_: Any) -> Any:
        return (tenant,)

    async def has(*_: Any) -> bool:
        return True

    async def refused(*_: Any) -> Any:
        raise Conflict("it is busy", reason="busy", until=5)

    async with members(folder, "m1", "m2") as (ours, other):
        async with Store(folder / "m1") as one, Store(folder / "m2") as two:
            async with (
                ours.open(app, one, nothing, nothing, {}, {}),
                other.open(app, two, theirs, has, facts, {}, {"refused": refused}),
            ):
                await until(lambda: "m2" in ours.peers.all and ours.peers.all["m2"].told.is_set())
                yield ours, ours.peers.all["m2"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "SETTLING", 0.05)
    monkeypatch.setattr(peers, "_SOON", 0.02)


@pytest.mark.parametrize(
    ("facts", "version"),
    [
        ({"v": PROTOCOL + 7, "weather": {"sun": True}, "version": "9.9"}, PROTOCOL + 7),
        ({"v": 1, "version": "0.0"}, 1),
        ({"v": "soon"}, 1),
        ({}, PROTOCOL),
    ],
    ids=["newer", "older", "odd", "same"],
)
async def test_a_peer_of_another_version_is_heard_and_asked(
    tmp_path: Path, facts: Mapping[str, Any], version: int
) -> None:
    tenant = Newer("shop", "shop.example.com", "running", False, "i-1", "today")
    async with beside(tmp_path, facts, tenant) as (ours, peer):
        await until(lambda: "shop" in peer.tenants)
        assert peer.tenants["shop"] == Known("shop", "shop.example.com", "running", False, "i-1", "today")
        assert (peer.version, peer.alive) == (version, True)
        assert await ours.find(tenant="shop") is peer
        # it does not answer every question yet: what it tells anyway is enough
        assert await ours.rooms() == {"m2": Room(1, None)}


async def test_a_peer_that_does_not_know_an_order_is_told_apart_from_one_that_refuses(tmp_path: Path) -> None:
    async with beside(tmp_path, {}, Known("shop")) as (ours, peer):
        with pytest.raises(OrderRefused) as unknown:
            await order(ours.peers, peer, "/peer/do/of-a-later-version", b"{}", 5)
        assert unknown.value.facts["reason"] == "older"
        with pytest.raises(OrderRefused) as refused:
            await order(ours.peers, peer, "/peer/do/refused", b"{}", 5)
        assert (refused.value.message, refused.value.facts) == ("it is busy", {"reason": "busy", "until": 5})
        peer.end()
        with pytest.raises(MemberAway):
            await order(ours.peers, peer, "/peer/do/refused", b"{}", 5)
