"""One tenant through all homes that it can get: its disk is limited at each, and nothing stays behind."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from gateway.rootfs.quotas import number_of
from tests.cluster.conftest import MakeTenant, Served
from tests.cluster.rig import Member
from tests.cluster.test_dying import booted
from tests.cluster.test_moving import moved
from tests.waits import until

pytestmark = [pytest.mark.timeout(500), pytest.mark.thorough]

Client = Callable[[Member], Served]

MiB = 1 << 20
_SIZE = 1280 * MiB  # the files of the image count after a move
_KEPT = 300 * MiB
_POOL = "/var/lib/incus/storage-pools/gateway"


async def fill(gateway: Served, tenant: str) -> int:
    """Write until the disk is full, as far as that may be; return how many bytes that were."""
    script = f"head -c {2 * _SIZE} /dev/zero >more; stat -c %s more; sync; rm more"
    command = {"argv": ["sh", "-c", script], "cwd": "/srv/site", "timeout_ms": 110_000}
    status, said = await gateway.ask("POST", f"/v1/tenants/{tenant}/exec", command)
    assert status == 200 and "quota exceeded" in said["stderr"], said
    return int(said["stdout"])


def group(member: Member, identity: str) -> int | None:
    """Return the bytes that count for an instance on a member, None if nothing does, by btrfs itself."""
    said = member.run("btrfs", "--format", "json", "qgroup", "show", "--raw", "--sync", _POOL)
    found = {one["qgroupid"]: int(one["referenced"]) for one in json.loads(said)["qgroup-show"]}
    return found.get(f"1/{number_of(identity)}")


async def test_the_disk_of_a_tenant_is_limited_wherever_it_comes(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    first, *others = members
    name = await make_tenant(first, "--device", f"root,size={_SIZE}")
    gateway = client(first)
    identity = str(first.query(f"/1.0/instances/{name}")["config"]["volatile.uuid"])

    async def limited(home: Member) -> None:
        """Hold that what is kept counts at its home, with what may be written besides, and nowhere else."""
        at, rest = client(home), [member for member in members if member is not home]
        await until(lambda: booted(at, name), 60, every=0.3)
        more = await fill(at, name)
        print(f"{home.name}: {group(home, identity)} count, {more} could be written")
        assert _SIZE // 8 < more <= _SIZE - _KEPT
        await until(lambda: all(group(member, identity) is None for member in rest), 90, every=1)

    await until(lambda: booted(gateway, name), 60, every=0.3)
    keep = {"argv": ["sh", "-c", f"head -c {_KEPT} /dev/urandom >kept; sync"], "cwd": "/srv/site"}
    status, said = await gateway.ask("POST", f"/v1/tenants/{name}/exec", keep)
    assert (status, said["exit_code"]) == (200, 0), said
    await limited(first)

    second = others[0]
    assert (await moved(gateway, name, second.name))["state"] == "moved"
    await limited(second)

    third = others[1]
    assert (await moved(client(second), name, third.name))["state"] == "moved"
    await limited(third)
    status, _ = await gateway.ask("DELETE", f"/v1/tenants/{name}")
    assert status == 204
    await until(lambda: all(group(member, identity) is None for member in members), 90, every=1)
