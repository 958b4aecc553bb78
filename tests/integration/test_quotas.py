"""Limits of tenants' disks by a pool's quotas of either kind; `test_disk_groups` has what the kernel does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.errors import Conflict, NotFound, TooLarge, Unavailable
from gateway.host.daemon import Daemon
from gateway.host.requirements import Finding, doctor, setup
from gateway.host.setup import (
    enforce_quotas,
    quota_kind,
    quotas_in_force,
    unlimited_tenants,
    wants_simple_quotas,
)
from gateway.rootfs import btrfs
from gateway.rootfs.broker_client import instances
from gateway.rootfs.quotas import SLACK as QUOTA_SLACK
from gateway.rootfs.quotas import Quotas
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.incus.disks import OURS, Disks
from gateway.settings import Settings
from tests import thorough
from tests.integration import environment
from tests.integration.conftest import Incusd
from tests.live import LiveGateway
from tests.waits import until

MiB = 1 << 20
SIZE = 1024 * MiB  # of a tenant's disk, of which the image takes 570 with full quotas
SLACK = QUOTA_SLACK + 8 * MiB  # and metadata

_numbers = itertools.count()


def _btrfs(*words: str | Path) -> str:
    return subprocess.run(["btrfs", *words], capture_output=True, text=True, check=True).stdout


def _pool(settings: Settings) -> Path:
    return settings.incus_socket.parent / "storage-pools" / settings.pool


@contextlib.contextmanager
def pool_of(incus_settings: Settings, kind: str) -> Iterator[Settings]:
    """Make a pool with quotas of a kind, and a profile for tenants on it; yield settings for both."""
    name = f"gwquotas-{kind}"
    environment.incus("storage", "create", name, "btrfs", "size=5GiB")
    try:
        environment.incus("profile", "copy", incus_settings.profile, name)
        device = ("profile", "device", "set", name, "root", f"pool={name}", f"size={SIZE}B")
        environment.incus(*device)
        settings = incus_settings.model_copy(
            update={"pool": name, "profile": name, "simple_quotas": kind == "simple"}
        )
        enforce_quotas(settings)
        if kind == "full":  # Incus does so for the first limit
            _btrfs("quota", "enable", _pool(settings))
            enforce_quotas(settings)
        assert quota_kind(settings) == kind
        yield settings
    finally:
        for instance in environment.instances():
            if name in instance["profiles"]:
                environment.incus("delete", "--force", instance["name"])
        environment.incus("profile", "delete", name, check=False)
        environment.incus("storage", "delete", name)


@pytest.fixture(scope="module")
def full(incus_settings: Settings) -> Iterator[Settings]:
    with pool_of(incus_settings, "full") as settings:
        yield settings


@pytest.fixture(scope="module")
def simple(incus_settings: Settings) -> Iterator[Settings]:
    if not wants_simple_quotas(incus_settings):
        pytest.fail("this host has no simple quotas: it needs Linux 6.8 and btrfs-progs 6.7")
    with pool_of(incus_settings, "simple") as settings:
        yield settings


@contextlib.asynccontextmanager
async def serving(settings: Settings, state: Path, **more: str) -> AsyncIterator[LiveGateway]:
    state.mkdir()
    gateway = LiveGateway(
        {
            "GATEWAY_INCUS_SOCKET": str(settings.incus_socket),
            "GATEWAY_NETWORK": settings.network,
            "GATEWAY_NETWORK_IPV4": settings.network_ipv4,
            "GATEWAY_POOL": settings.pool,
            "GATEWAY_PROFILE": settings.profile,
            "GATEWAY_STATE_DIR": str(state),
            **more,
        },
        state.with_suffix(".log"),
    )
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


@contextlib.contextmanager
def given_up(settings: Settings) -> Iterator[Path]:
    """Have the kernel give the quotas up, as the deletion of a large tenant does; yields its threshold."""
    pool = _pool(settings)
    # nobody else deletes these meanwhile; what two share cannot be counted without a look at all of it
    own, shared = pool / "quota-test", pool / "quota-test-copy"
    uuid = _btrfs("filesystem", "show", pool).partition("uuid: ")[2].split()[0]
    threshold = Path("/sys/fs/btrfs", uuid, "qgroups", "drop_subtree_threshold")
    threshold.write_text("3")
    _btrfs("subvolume", "create", own)
    (own / "file").write_bytes(os.urandom(1 << 20))
    _btrfs("filesystem", "sync", pool)
    _btrfs("subvolume", "snapshot", own, shared)
    _btrfs("filesystem", "sync", pool)
    below = "0/" + _btrfs("inspect-internal", "rootid", own).strip()
    _btrfs("qgroup", "create", "1/77", pool)
    try:
        _btrfs("qgroup", "assign", "--no-rescan", below, "1/77", pool)
        assert not quotas_in_force(settings)
        yield threshold
    finally:
        _btrfs("qgroup", "remove", below, "1/77", pool)
        _btrfs("qgroup", "destroy", "1/77", pool)
        _btrfs("subvolume", "delete", own, shared)
        enforce_quotas(settings)


def _look(settings: Settings) -> Finding:
    return next(found for found in doctor(settings) if found.what.startswith("storage pool"))


# --- full quotas ------------------------------------------------------------------------------------------


def test_setup_enforces_quotas_that_the_kernel_gave_up(full: Settings, incus_settings: Settings) -> None:
    """A tenant that is deleted cannot end the others' disk limits for good; doctor says so meanwhile."""
    assert "disk quotas" in {one.step for one in setup(incus_settings, lambda line: None)}
    assert enforce_quotas(full) is None and quotas_in_force(full)
    with given_up(full) as threshold:
        assert not _look(full).ok and "incus-gateway setup" in _look(full).detail
        assert "counted again" in str(enforce_quotas(full))
        assert quotas_in_force(full) and _look(full).ok
        assert threshold.read_text().strip() == "8"
        assert enforce_quotas(full) is None


def test_the_doctor_tells_of_simple_ones(full: Settings) -> None:
    assert not _look(full).hint  # these settings want full ones
    found = _look(full.model_copy(update={"simple_quotas": True}))
    assert found.hint and "docs/operations.md" in found.detail


async def test_a_gateway_enforces_them_once_incusd_is_back(
    full: Settings, incusd: Incusd, tmp_path: Path
) -> None:
    """Each start of incusd may mount the pool anew, by the kernel's own rules."""
    async with serving(full, tmp_path / "state", GATEWAY_RECONCILE_INTERVAL="3600") as gateway:
        await incusd.kill()
        with given_up(full) as threshold:
            ahead = threshold.parent.parent / "bdi" / "read_ahead_kb"
            ahead.write_text("4096")
            await asyncio.to_thread(Daemon.at(full.incus_socket).ensure, lambda line: None)
            await until(lambda: quotas_in_force(full))
            assert threshold.read_text().strip() == "8"
            await until(lambda: ahead.read_text().strip() == "128")
        assert "disk quotas: what each tenant uses was counted again" in gateway.log.read_text()


async def test_a_restored_disk_has_its_limit(full: Settings) -> None:
    """Incus makes a new subvolume for it. A limit that was lifted comes back with the second look.

    `test_limits_in_force` has the same of simple ones.
    """
    pool, name = Quotas(_pool(full)), "quotas-restored"
    async with IncusRuntime(full) as runtime:
        await runtime.tenants.create(name)
        await runtime.snapshots.create(name, "s")
        await runtime.snapshots.restore(name, "s")
        identity = (await runtime.tenants.get(name)).instance or ""
        assert pool.limit_of(name, identity) == SIZE
        own = btrfs.subvolume(_pool(full) / "containers" / name).number
        _btrfs("qgroup", "limit", "none", f"0/{own}", _pool(full))
        assert pool.limit_of(name, identity) is None
        for _ in range(2):
            await runtime.resizing.enforce()
        assert pool.limit_of(name, identity) == SIZE
        await runtime.tenants.destroy(name)


async def test_what_is_left_of_our_snapshots_is_deleted(full: Settings) -> None:
    """Of one without its volume, with which Incus starts and copies nothing, and without its subvolume."""
    name, ours = "quotas-left", [f"{OURS}standby-{number}" for number in range(3)]
    async with IncusRuntime(full) as runtime:
        await runtime.tenants.create(name, start=False)
        for snapshot in ours:
            await asyncio.to_thread(environment.incus, "snapshot", "create", name, snapshot)
        of = f"storage_volume_id IN (SELECT id FROM storage_volumes WHERE name='{name}')"
        query = f"DELETE FROM storage_volumes_snapshots WHERE name='{ours[0]}' AND {of}"
        environment.incus("admin", "sql", "global", query)
        _btrfs("subvolume", "delete", _pool(full) / "containers-snapshots" / name / ours[1])
        with pytest.raises(Unavailable):
            await runtime.tenants.start(name)
        await Disks(full, runtime.incus).tidy(name, ours[2])
        await runtime.tenants.start(name)
        found = json.loads(environment.incus("query", f"/1.0/instances/{name}/snapshots").stdout)
        assert [path.rpartition("/")[2] for path in found] == [ours[2]]
        await runtime.tenants.destroy(name)


# --- simple quotas ----------------------------------------------------------------------------------------


def _used(settings: Settings) -> int:
    """Return the bytes in use of a pool, once what was deleted is gone."""
    pool = _pool(settings)
    _btrfs("filesystem", "sync", pool)
    _btrfs("subvolume", "sync", pool)
    _btrfs("filesystem", "sync", pool)
    space = os.statvfs(pool)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


async def _sh(name: str, script: str) -> str:
    """Run a script as the tenant's user; return what it printed."""
    words = ("exec", name, "--user=1000", "-T", "--", "sh", "-c", script)
    # with input, so that nothing of it is recorded on a full disk
    return (await asyncio.to_thread(environment.incus, *words, stdin=b"\n")).stdout.decode()


async def _fill(name: str, path: str, size: int = 2 * SIZE) -> int:
    """Write a new file below the workspace until the disk is full; return its bytes."""
    write = f"head -c {size} /dev/zero 2>/dev/null >{path}; sync; stat -c %s {path}"
    return int(await _sh(name, f"cd /srv/site; {write} || echo 0"))


async def _counted(runtime: IncusRuntime, name: str) -> int:
    return int((await runtime.usage.metrics(name))["disk_bytes"])


@pytest.fixture
async def runtime(simple: Settings) -> AsyncIterator[IncusRuntime]:
    async with IncusRuntime(simple) as runtime:
        yield runtime


@pytest.fixture
async def tenant(runtime: IncusRuntime) -> AsyncIterator[str]:
    name = f"quotas-{next(_numbers)}"
    await runtime.tenants.create(name)
    yield name
    await runtime.tenants.destroy(name)


async def test_restores_give_no_more_room(simple: Settings, runtime: IncusRuntime, tenant: str) -> None:
    """A tenant that is full, goes back, and fills its disk again, holds what its disk may hold, and runs."""
    before = _used(simple)
    await _fill(tenant, "first", SIZE // 2)
    for number in range(3 if thorough.ALL else 2):
        await runtime.snapshots.create(tenant, f"s{number}")
        written = await _fill(tenant, f"more{number}")
        assert _used(simple) - before <= SIZE + SLACK
        await runtime.snapshots.restore(tenant, f"s{number}")
        assert (await runtime.tenants.get(tenant)).status == "running"
        assert SIZE // 4 < written < SIZE // 2
        assert SIZE // 2 <= await _counted(runtime, tenant) < SIZE // 4 * 3
    for snapshot in await runtime.snapshots.list(tenant):
        await runtime.snapshots.delete(tenant, snapshot.name)
    await _sh(tenant, "rm /srv/site/first; sync")
    assert await _fill(tenant, "again", SIZE // 4 * 3) == SIZE // 4 * 3


async def test_a_full_tenant_can_be_restarted_and_destroyed(runtime: IncusRuntime) -> None:
    """Incus stops it, but fails as it tidies its disk."""
    await runtime.tenants.create("quotas-full")
    await _fill("quotas-full", "file")
    await runtime.tenants.stop("quotas-full")
    await runtime.tenants.start("quotas-full")
    assert (await runtime.tenants.get("quotas-full")).status == "running"
    await runtime.tenants.destroy("quotas-full")
    with pytest.raises(NotFound):
        await runtime.tenants.get("quotas-full")


async def test_subvolumes_of_its_own_count(simple: Settings, runtime: IncusRuntime, tenant: str) -> None:
    """A tenant needs no rights to make them, and restores make them anew."""
    before = _used(simple)
    # struct btrfs_ioctl_vol_args, BTRFS_IOC_SUBVOL_CREATE
    script = "fcntl.ioctl(os.open('.', 0), 0x5000940e, bytearray(struct.pack('=q4088s', 0, b'own')))"
    await _sh(tenant, f'cd /srv/site && python3 -c "import fcntl, os, struct; {script}"')
    await _fill(tenant, "own/first", SIZE // 2)
    await runtime.snapshots.create(tenant, "s")
    await runtime.snapshots.restore(tenant, "s")
    assert SIZE // 4 < await _fill(tenant, "own/second") < SIZE // 2
    assert _used(simple) - before <= SIZE + SLACK


async def test_clones_of_clones_end(runtime: IncusRuntime, tenant: str) -> None:
    """A clone counts what it writes; what it shares is bounded by a disk's size."""
    await _fill(tenant, "file", SIZE // 8 * 5)
    clone = await runtime.tenants.clone(tenant, f"{tenant}-clone")
    try:
        assert await _counted(runtime, clone.name) < SLACK
        await _fill(clone.name, "own", SIZE // 8 * 4)
        with pytest.raises(TooLarge, match="a clone itself"):
            await runtime.tenants.clone(clone.name, f"{tenant}-again")
    finally:
        await runtime.tenants.destroy(clone.name)


async def test_a_size_that_changes(simple: Settings, runtime: IncusRuntime, tenant: str) -> None:
    """Snapshots count, so that a disk may be too full for a smaller size whose files would fit."""
    await runtime.tenants.resize(tenant, "medium")
    await _fill(tenant, "file", SIZE // 4 * 5)
    await runtime.snapshots.create(tenant, "s")
    await _sh(tenant, "rm /srv/site/file; sync")
    with pytest.raises(Conflict, match="MiB of disk") as refused:
        await runtime.tenants.resize(tenant, "small")
    assert refused.value.facts["used"] > SIZE
    await runtime.snapshots.delete(tenant, "s")
    await runtime.tenants.resize(tenant, "small")
    assert await _fill(tenant, "file") <= SIZE
    assert unlimited_tenants(simple, [tenant]) == []


async def test_what_an_operator_restores_is_limited_too(
    simple: Settings, runtime: IncusRuntime, tenant: str
) -> None:
    """By the look that a gateway takes each half minute, at all disks; doctor tells of it until then."""
    await runtime.snapshots.create(tenant, "s")
    for words in (("stop", "--force", tenant), ("snapshot", "restore", tenant, "s"), ("start", tenant)):
        await asyncio.to_thread(environment.incus, *words)
    assert not _look(simple).ok and tenant in _look(simple).detail
    assert instances(simple).limit_disks() == 1
    assert _look(simple).ok and unlimited_tenants(simple, [tenant]) == []


async def test_destroyed_tenants_leave_nothing(simple: Settings, runtime: IncusRuntime) -> None:
    def groups() -> set[str]:
        listed = json.loads(_btrfs("--format", "json", "qgroup", "show", _pool(simple)))
        return {one["qgroupid"] for one in listed["qgroup-show"]}

    enforce_quotas(simple)
    before = groups()
    await runtime.tenants.create("quotas-gone")
    await _fill("quotas-gone", "file", MiB)
    await runtime.snapshots.create("quotas-gone", "s")
    await runtime.snapshots.restore("quotas-gone", "s")
    assert len(groups() - before) >= 3
    await runtime.tenants.destroy("quotas-gone")
    _used(simple)
    enforce_quotas(simple)
    assert groups() - before == set()
