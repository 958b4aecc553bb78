"""Revoked tokens: kept as long as they could be used, and known to all gateways of a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from gateway.auth.grants import KEPT, Revocations
from gateway.cluster.keys import Revoking, Spread
from gateway.errors import RateLimited, Unavailable
from gateway.storage.store import Store
from tests.shared_memory import MemoryKeys
from tests.waits import settled, until


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with Store(tmp_path) as store:
        yield store


async def test_a_revoked_token_is_refused_in_the_next_life_too(store: Store) -> None:
    first = await Revocations.opened(store)
    await first.add("a", "me")
    await first.add("b", "me", time.time() + 60)
    later = await Revocations.opened(store)
    assert "a" in later and "b" in later and "c" not in later


async def test_one_whose_token_has_long_expired_is_forgotten(store: Store) -> None:
    first = await Revocations.opened(store)
    await first.add("old", "me", time.time() - KEPT - 1)
    await first.add("just", "me", time.time() - 1)
    await first.add("unknown", "me")
    later = await Revocations.opened(store)
    assert set(later.standing()) == {"just", "unknown"}


async def test_expired_ones_make_room(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.auth.grants.MOST", 2)
    revoked = await Revocations.opened(store)
    await revoked.add("old", "me", time.time() - KEPT - 1)
    await revoked.add("a", "me")
    await revoked.add("b", "me")
    with pytest.raises(RateLimited):
        await revoked.add("c", "me")
    assert set(revoked.standing()) == {"a", "b"}


# --- in a cluster --------------------------------------------------------------------------------------


class Gateway:
    """What a gateway knows of revocations. Its peers hear it where `near`."""

    def __init__(self, cluster: Cluster, name: str, local: Revocations) -> None:
        self.cluster, self.name, self.local = cluster, name, local
        self.ended = list[str]()
        self.near = True
        self.revoking = Revoking(local, cluster.keys, self._end, self._tell)

    def _end(self, token: str) -> int:
        self.ended.append(token)
        return 2  # websockets

    async def revoke(self, token: str, expires: float) -> Spread:
        await self.local.add(token, "me", expires)
        return await self.revoking.spread(token)

    async def _tell(self, token: str, expires: float) -> tuple[int, Sequence[str]]:
        closed, unheard = 0, []
        for peer in self.cluster.gateways:
            if peer.near and peer is not self:
                closed += await peer.revoking.heard(token, expires, "m")
            elif peer is not self:
                unheard.append(peer.name)
        return closed, unheard


class Cluster:
    def __init__(self) -> None:
        self.keys = MemoryKeys()
        self.gateways: list[Gateway] = []

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Have all follow the keys; what breaks off does not begin again."""
        tasks = [asyncio.create_task(one.revoking.follow()) for one in self.gateways]
        tasks += [asyncio.create_task(self._tell(one.revoking)) for one in self.gateways]
        await settled()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, revoking: Revoking) -> None:
        async for _ in self.keys.changes():
            revoking.look_soon()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster()
    async with contextlib.AsyncExitStack() as stack:
        for name in ("m1", "m2", "m3"):
            folder = tmp_path / name
            folder.mkdir()
            local = await Revocations.opened(await stack.enter_async_context(Store(folder)))
            cluster.gateways.append(Gateway(cluster, name, local))
        yield cluster


async def test_a_token_is_revoked_at_all_gateways_when_that_is_answered(cluster: Cluster) -> None:
    m1, m2, m3 = cluster.gateways
    assert await m1.revoke("a", time.time() + 60) == Spread(True, [], 4)
    assert await m1.revoke("a", time.time() + 60) == Spread(True, []), "it closes nothing twice"
    assert "a" in m2.local and "a" in m3.local
    assert (m1.ended, m2.ended, m3.ended) == ([], ["a"], ["a"]), "its own end is the caller's to bring"


async def test_who_did_not_hear_it_is_named_and_finds_it_in_the_keys_within_a_second(
    cluster: Cluster,
) -> None:
    m1, m2, m3 = cluster.gateways
    m3.near = False
    async with cluster.following():
        began = time.monotonic()
        assert await m1.revoke("a", time.time() + 60) == Spread(True, ["m3"], 2)
        assert "a" in m2.local
        await until(lambda: m3.ended == ["a"])
        assert time.monotonic() - began < 1
        assert "a" in m3.local


async def test_who_was_away_finds_it_at_its_start(cluster: Cluster) -> None:
    m1, _, m3 = cluster.gateways
    m3.near = False
    await m1.revoke("a", time.time() + 60)
    assert "a" not in m3.local
    await m3.revoking.agree()
    assert "a" in m3.local


async def test_without_a_quorum_it_is_in_force_at_those_that_hear_it_and_is_written_later(
    cluster: Cluster,
) -> None:
    m1, m2, m3 = cluster.gateways
    m3.near = False
    cluster.keys.quorum = False
    assert await m1.revoke("a", time.time() + 60) == Spread(False, ["m3"], 2)
    assert "a" in m1.local and "a" in m2.local
    with pytest.raises(Unavailable):
        await m1.revoking.agree()
    cluster.keys.quorum = True
    async with cluster.following():
        await until(lambda: "a" in m3.local)
    assert len(await cluster.keys.listed("revoked.")) == 1


async def test_a_server_that_joins_brings_its_revocations(cluster: Cluster) -> None:
    m1, m2, _ = cluster.gateways
    await m1.local.add("a", "me")
    await m1.revoking.agree()
    await m2.revoking.agree()
    assert "a" in m2.local


async def test_the_keys_of_expired_tokens_are_removed(cluster: Cluster) -> None:
    m1, m2, _ = cluster.gateways
    await m1.revoke("old", time.time() - KEPT - 1)
    await m1.revoke("new", time.time() + 60)
    await m2.revoking.agree()
    await m1.revoking.agree()
    (value,) = (await cluster.keys.listed("revoked.")).values()
    assert "new" in value


async def test_any_id_can_be_revoked_and_a_spoilt_key_breaks_nothing(cluster: Cluster) -> None:
    m1, m2, _ = cluster.gateways
    m2.near = False
    cluster.keys.values["revoked.spoilt"] = "scribble"
    for token in ("../x y/ü", "A" * 200):
        await m1.revoke(token, time.time() + 60)
    await m2.revoking.agree()
    assert "../x y/ü" in m2.local and "A" * 200 in m2.local
    assert cluster.keys.values["revoked.spoilt"] == "scribble"


async def test_more_than_the_cluster_takes_are_refused_here_all_the_same(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> bool:
        raise RateLimited("too many keys")

    m1, m2, _ = cluster.gateways
    monkeypatch.setattr(cluster.keys, "swap", full)
    assert await m1.revoke("a", time.time() + 60) == Spread(False, [], 4)
    await m1.revoking.agree()
    assert "a" in m1.local and "a" in m2.local
