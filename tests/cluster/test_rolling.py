"""A cluster is upgraded member by member, gateways and incusds, under clients that never pause.

The gateways begin as those of an earlier commit: the first that spoke the present version to its peers, or
the one that GATEWAY_TEST_EARLIER names.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import pytest

from gateway.cluster.listener import PROTOCOL
from tests.cluster.conftest import MakeTenant, Served, heal, slack
from tests.cluster.rig import CHECKOUT, Member, Rig
from tests.cluster.test_moving import usable, where
from tests.steady import steady

pytestmark = [pytest.mark.timeout(900), pytest.mark.thorough]

Client = Callable[[Member], Served]

_GAP: Final = 5.0  # seconds without an answer of one tenant, on a machine with nothing else to do


def git(*words: str) -> bytes:
    done = subprocess.run(["git", "-C", str(CHECKOUT), *words], check=False, capture_output=True)
    if done.returncode:
        pytest.fail(f"an earlier commit is needed, in a clone with its history: {done.stderr.decode()}")
    return done.stdout


@pytest.fixture(scope="module")
def earlier(cluster: Rig) -> Path:
    """A checkout of the earlier commit, where members can see it."""
    spoken = f"PROTOCOL: Final = {PROTOCOL}\n"
    found = git("log", "--reverse", "--format=%H", f"-S{spoken}", "--", "gateway/cluster/listener.py").split()
    commit = os.environ.get("GATEWAY_TEST_EARLIER") or found[0].decode()
    folder = cluster.folder / "earlier"
    folder.mkdir(exist_ok=True)
    archive = git("archive", commit)
    subprocess.run(["tar", "--extract", f"--directory={folder}"], input=archive, check=True)
    print(git("log", "-1", "--format=beside %h of %cs: %s", commit).decode().strip())
    return folder


def checkout_of(member: Member) -> Path:
    """Return from which checkout the member's gateway runs."""
    pid = member.run("pgrep", "--oldest", "--full", "incus-gateway serve").strip()
    said = member.run("cat", f"/proc/{pid}/environ").split("\0")
    (path,) = (one.removeprefix("PYTHONPATH=") for one in said if one.startswith("PYTHONPATH="))
    return Path(path.partition(":")[0])


@pytest.fixture
async def earlier_everywhere(cluster: Rig, earlier: Path) -> AsyncIterator[None]:
    """Each member's gateway is of the earlier commit, with records of its own; afterwards of this one."""

    def begin(member: Member) -> None:
        member.ours("ungateway")
        for file in (member.state / "gateway").glob("gateway.db*"):  # a later format would be refused
            file.unlink()
        member.of(earlier, "gateway")
        assert checkout_of(member) == earlier

    await asyncio.gather(*(asyncio.to_thread(begin, member) for member in cluster.members))
    yield
    await asyncio.gather(*(asyncio.to_thread(heal, member) for member in cluster.members))


async def test_gateways_are_upgraded_one_by_one(
    cluster: Rig, client: Client, make_tenant: MakeTenant, earlier_everywhere: None
) -> None:
    """Two versions stand side by side meanwhile. No client notices more than that one answer took longer."""
    gateways = {member.name: client(member) for member in cluster.members}
    tenants = [await make_tenant(member) for member in cluster.members]
    for gateway in gateways.values():
        for tenant in tenants:
            await usable(gateway, tenant)
    async with steady(gateways, tenants) as clients:
        for member in cluster.members:
            began = time.monotonic()
            said = await asyncio.to_thread(member.ours, "gateway")
            assert "replaced" in said, said
            assert checkout_of(member) == CHECKOUT
            print(f"{member.name} replaced in {time.monotonic() - began:.1f} s")
            await clients.served()
    for watcher in clients.watchers:
        assert watcher.lost == []
    for caller in clients.callers:
        assert not caller.unknown and caller.gap < _GAP * slack()


@pytest.mark.parametrize("drained", [False, True], ids=["in use", "drained"])
async def test_incusds_are_restarted_one_by_one(
    cluster: Rig, client: Client, members: tuple[Member, ...], make_tenant: MakeTenant, drained: bool
) -> None:
    """What runs in tenants of the other members goes on, and incusd ends by itself where it is drained."""
    gateways = {member.name: client(member) for member in members}
    homes = {await make_tenant(member): member for member in members}
    for gateway in gateways.values():
        for tenant in homes:
            await usable(gateway, tenant)
    async with steady(gateways, [*homes]) as clients:
        for member in members:
            other = next(one for one in members if one is not member)
            if drained:
                await asyncio.to_thread(other.ours, "drain", TEST_NAME=member.name)
                await clients.served()
            began = time.monotonic()
            await asyncio.to_thread(member.ours, "stop" if drained else "term", "incusd")
            stopped = time.monotonic() - began
            await asyncio.to_thread(member.ours, "incusd")
            print(f"{member.name}: stopped in {stopped:.1f} s, back after {time.monotonic() - began:.1f} s")
            await clients.served()
            if drained:
                await asyncio.to_thread(other.ours, "restore", TEST_NAME=member.name)
                await clients.served()
    assert {tenant: where(cluster.first, tenant) for tenant in homes} == {
        tenant: home.name for tenant, home in homes.items()
    }
