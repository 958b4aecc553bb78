"""The peers of a gateway: for whom it waits before it serves."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import orjson
import pytest

from gateway.cluster import peers as looks
from gateway.cluster.identity import Identity
from gateway.cluster.peers import KEY, Peers
from gateway.incus import IncusError
from gateway.incus.members import Member
from tests.live import free_ports
from tests.waits import settled, until


class Members:
    """Three members, of which the second has never come up; where the third was nobody listens now."""

    def __init__(self, folder: Path) -> None:
        self.failures = 0  # reads that still fail, as in an Incus that has just started
        folder.mkdir()
        said = {"address": f"127.0.0.1:{free_ports(1)[0]}", "certificate": Identity(folder).certificate}
        self.found = [Member("m1"), Member("m2"), Member("m3", config={KEY: orjson.dumps(said).decode()})]

    async def members(self) -> Sequence[Member]:
        if self.failures:
            self.failures -= 1
            raise IncusError("no available cowsql leader server found", 500)
        return self.found

    async def publish(self, config: Mapping[str, str]) -> None:
        raise AssertionError("there is nothing to publish")


@contextlib.asynccontextmanager
async def following(folder: Path, *names: str, failures: int = 0) -> AsyncIterator[Peers]:
    """Yield the peers of the first member, of those with these names."""
    members = Members(folder / "m3")
    members.failures = failures
    members.found = [member for member in members.found if member.name in names]
    (folder / "m1").mkdir()
    async with Peers("m1", members, Identity(folder / "m1")) as peers:
        yield peers


async def test_who_has_come_up_before_is_waited_for(tmp_path: Path) -> None:
    async with following(tmp_path, "m1", "m2", "m3") as peers:
        settling = asyncio.create_task(peers.settle(60))
        await until(lambda: "m3" in peers.all)
        await settled()
        assert not settling.done()
        peers.all["m3"].told.set()
        await asyncio.wait_for(settling, 10)


async def test_who_never_has_is_not_waited_for(tmp_path: Path) -> None:
    """Else gateways that are started at once would wait for one another."""
    async with following(tmp_path, "m1", "m2") as peers:
        await asyncio.wait_for(peers.settle(60), 10)
        assert peers.all.keys() == {"m2"}


async def test_the_wait_has_an_end(tmp_path: Path) -> None:
    async with following(tmp_path, "m1", "m2", "m3") as peers:
        await asyncio.wait_for(peers.settle(0.2), 10)
        assert peers.all.keys() == {"m2", "m3"}


async def test_an_incus_that_cannot_say_the_members_yet_is_soon_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then this gateway is nobody's peer: it knows neither who they are nor where it is."""
    monkeypatch.setattr(looks, "_SOON", 0.01)
    monkeypatch.setattr(looks, "_LOOK", 3600.0)
    async with following(tmp_path, "m1", "m2", failures=3) as peers:
        await asyncio.wait_for(peers.known(), 30)
        assert peers.all.keys() == {"m2"}


async def test_a_removed_member_is_away_for_a_while_and_known_by_its_certificate_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to the next process; and how long ago it was last heard. One that joins again is a member."""
    monkeypatch.setattr(looks, "_REMOVED", 0.0)
    monkeypatch.setattr(looks, "_SOON", 0.01)
    members = Members(tmp_path / "m3")
    everybody = members.found
    shown = ssl.PEM_cert_to_DER_cert(Identity(tmp_path / "m3").certificate)
    (tmp_path / "m1").mkdir()
    async with Peers("m1", members, Identity(tmp_path / "m1")) as peers:
        await until(lambda: peers.of(shown) is not None)
        assert not await peers.was_removed(shown)
        began = time.time()
        peers.all["m3"].hear()
        peers.all["m3"].end()  # its silence is long enough
        members.found = everybody[:2]
        peers.look()
        await until(lambda: "m3" not in peers.present)
        assert "m3" in peers.all and peers.of(shown) is None and await peers.was_removed(shown)
        peers.look()
        await until(lambda: "m3" not in peers.all)
    async with Peers("m1", members, Identity(tmp_path / "m1")) as peers:
        await peers.known()
        heard = peers.heard("m3")
        assert heard is not None and began - 1 <= heard <= time.time()
        assert peers.was_known(shown) and await peers.was_removed(shown)
        members.found = [*everybody[:2], Member("m3")]  # it has not published its certificate yet
        assert not await peers.was_removed(shown)
        members.found = everybody
        peers.look()
        await until(lambda: peers.of(shown) is not None)
        assert not await peers.was_removed(shown)
        stranger = ssl.PEM_cert_to_DER_cert(Identity(tmp_path).certificate)
        assert not peers.was_known(stranger) and not await peers.was_removed(stranger)
