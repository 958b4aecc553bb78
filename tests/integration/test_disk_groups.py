"""Limits of disks by simple quotas, on the kernel alone: what a tenant may try, and what Incus does."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from gateway.rootfs import btrfs, quotas
from gateway.rootfs.quotas import DiskGroups, Quotas

MiB = 1 << 20
SIZE = 24 * MiB
SLACK = 2 * MiB  # the kernel's own metadata of a subvolume
USER = 1000


def run(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """Mount a new btrfs as Incus mounts its pools; yield where."""
    image, pool = folder / "image", folder / "pool"
    with image.open("wb") as file:
        file.truncate(256 * MiB)
    run("mkfs.btrfs", "--quiet", image)
    pool.mkdir()
    run("mount", "-o", "loop,user_subvol_rm_allowed", image, pool)
    try:
        for kind in ("containers", "containers-snapshots"):
            (pool / kind).mkdir()
        yield pool
    finally:
        run("umount", pool)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path) as pool:
        Quotas(pool).begin_simple()
        yield pool


@dataclass
class Disk:
    """The disk of an instance, changed as Incus changes it."""

    pool: Path
    name: str
    identity: str

    @property
    def volume(self) -> Path:
        return self.pool / "containers" / self.name

    @property
    def rootfs(self) -> Path:
        return self.volume / "rootfs"

    @property
    def groups(self) -> DiskGroups:
        found = Quotas(self.pool).groups()
        assert found is not None
        return found

    def limit(self, size: int = SIZE) -> int:
        run("btrfs", "filesystem", "sync", self.pool)
        return self.groups.limit(self.name, self.identity, size)

    def snapshot(self, name: str) -> None:
        kept = self.pool / "containers-snapshots" / self.name
        kept.mkdir(exist_ok=True)
        copied(self.volume, kept / name)

    def restore(self, name: str) -> None:
        away = self.volume.with_name(f"{self.name}.tmp")
        self.volume.rename(away)
        copied(self.pool / "containers-snapshots" / self.name / name, self.volume)
        deleted(away)

    def destroy(self) -> None:
        kept = self.pool / "containers-snapshots" / self.name
        for volume in [*(kept.iterdir() if kept.is_dir() else ()), self.volume]:
            deleted(volume)

    def fill(self, name: str, size: int = 2 * SIZE, folder: Path | None = None) -> int:
        """Write a new file until it is full; return the bytes written."""
        written, block = 0, os.urandom(MiB)
        try:
            with (folder or self.rootfs).joinpath(name).open("wb", buffering=0) as file:
                while written < size:
                    written += file.write(block)
                    os.fsync(file.fileno())
        except OSError as error:
            assert error.errno == errno.EDQUOT
        return written


def copied(volume: Path, to: Path) -> None:
    """Copy a subvolume with those below it, each by a snapshot, as Incus does."""
    run("btrfs", "subvolume", "snapshot", volume, to)
    for below in sorted(volume.rglob("*")):
        if below.is_dir() and below.stat().st_ino == 256:
            place = to / below.relative_to(volume)
            place.rmdir()
            run("btrfs", "subvolume", "snapshot", below, place)


def deleted(volume: Path) -> None:
    for below in sorted(volume.rglob("*"), reverse=True):
        if below.is_dir() and below.stat().st_ino == 256:
            run("btrfs", "subvolume", "delete", below)
    run("btrfs", "subvolume", "delete", volume)


def made(pool: Path, name: str, *, of: Path | None = None) -> Disk:
    """Make an instance's disk, a copy of another one, and limit it."""
    disk = Disk(pool, name, str(uuid4()))
    if of is None:
        run("btrfs", "subvolume", "create", disk.volume)
        disk.rootfs.mkdir()
        os.chown(disk.rootfs, USER, USER)
    else:
        copied(of, disk.volume)
    disk.limit()
    return disk


def used(pool: Path) -> int:
    """Return the bytes of the file system that are in use, once what was deleted is gone."""
    run("btrfs", "filesystem", "sync", pool)
    run("btrfs", "subvolume", "sync", pool)
    run("btrfs", "filesystem", "sync", pool)
    space = os.statvfs(pool)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


def test_restores_give_no_more_room(pool: Path) -> None:
    """However often a tenant fills its disk, snapshots it and goes back, it holds what its disk may hold."""
    before, disk = used(pool), made(pool, "shop")
    written = disk.fill("first", SIZE // 2)
    for number in range(4):
        disk.snapshot(f"s{number}")
        written += disk.fill(f"more{number}")
        disk.restore(f"s{number}")
        disk.limit()
        assert used(pool) - before <= SIZE + SLACK
    assert written >= SIZE - SLACK  # it was of use
    assert disk.limit() <= SIZE


def test_a_deleted_snapshot_makes_room(pool: Path) -> None:
    disk = made(pool, "shop")
    disk.fill("file", SIZE // 4 * 3)
    disk.snapshot("s")
    (disk.rootfs / "file").unlink()
    assert disk.fill("again") < SIZE // 2
    (disk.rootfs / "again").unlink()
    deleted(pool / "containers-snapshots/shop/s")
    disk.groups.free(30)
    assert disk.fill("again", SIZE // 2) == SIZE // 2


@pytest.mark.parametrize("restored", [False, True])
def test_subvolumes_of_its_own_count(pool: Path, restored: bool) -> None:
    """A tenant needs no rights to make subvolumes; those that were restored were made outside its group."""
    disk = made(pool, "shop")
    own = disk.rootfs / "own"
    user = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    subprocess.run([*user, "btrfs", "subvolume", "create", "own"], cwd=disk.rootfs, check=True)
    if restored:
        disk.snapshot("s")
        disk.restore("s")
        disk.limit()
    assert disk.fill("file", SIZE // 2, own) == SIZE // 2
    twice = disk.rootfs / "twice"
    run("btrfs", "subvolume", "snapshot", own, twice)
    assert SIZE // 2 - SLACK <= disk.fill("more", folder=twice) <= SIZE // 2
    assert disk.fill("more", folder=own) < SLACK


def test_reflinks_hold_what_was_written(pool: Path) -> None:
    """A copy that shares takes no room, and what it shares counts until the last one is gone."""
    disk = made(pool, "shop")
    disk.fill("file", SIZE // 4 * 3)
    counted = disk.limit()
    for number in range(20):
        run("cp", "--reflink=always", disk.rootfs / "file", disk.rootfs / f"copy{number}")
    assert disk.limit() - counted < SLACK
    (disk.rootfs / "file").unlink()
    assert disk.limit() >= SIZE // 4 * 3
    assert disk.fill("more") < SIZE // 2


def test_tenants_count_apart(pool: Path) -> None:
    """One that is full leaves another its room, and a rename takes its count along."""
    one, other = made(pool, "one"), made(pool, "other")
    one.fill("file")
    assert other.fill("file", SIZE // 2) == SIZE // 2
    one.volume.rename(one.volume.with_name("renamed"))
    one.name = "renamed"
    assert one.limit() > SIZE - SLACK > other.limit()
    with one.groups._volume() as volume:
        parents = [
            list(btrfs.relatives(volume, btrfs.group(0, btrfs.subvolume(disk.volume).number)))
            for disk in (one, other)
        ]
    assert [len(found) for found in parents] == [1, 1] and parents[0] != parents[1]


def test_a_clone_counts_what_it_writes(pool: Path) -> None:
    """What it shares counts for its source, also when that is destroyed; then what is left goes with it."""
    source = made(pool, "source")
    source.fill("file", SIZE // 2)
    clone = made(pool, "clone", of=source.volume)
    assert clone.limit() < SLACK
    assert clone.fill("own", SIZE // 4) == SIZE // 4
    source.destroy()
    used(pool)
    clone.groups.reap()
    assert groups_of(pool) >= {quotas.number_of(one.identity) for one in (source, clone)}
    clone.destroy()
    used(pool)
    clone.groups.reap()
    assert groups_of(pool) == set()


def test_what_a_copy_has_received_counts_for_the_tenant_that_is_made_of_it(pool: Path) -> None:
    """Also what came with snapshots that are gone by then; the copy itself has no limit."""
    copy = Disk(pool, "standby_shop", str(uuid4()))
    kept = pool / "containers-snapshots" / copy.name
    kept.mkdir()
    run("btrfs", "subvolume", "create", kept / "0")
    (kept / "0/rootfs").mkdir()
    for number in range(3):  # each refresh receives a snapshot, and makes the disk anew of it
        copy.fill(f"file{number}", SIZE // 4, kept / str(number) / "rootfs")
        if number:
            deleted(copy.volume)
        copied(kept / str(number), copy.volume)
        copy.limit(0)
        copied(kept / str(number), kept / str(number + 1))
        deleted(kept / str(number))
    shop = Disk(pool, "shop", str(uuid4()))
    copied(copy.volume, shop.volume)
    shop.groups.limit(shop.name, shop.identity, SIZE, former=copy.identity)
    copy.destroy()
    used(pool)
    shop.groups.reap()
    assert shop.limit() >= SIZE // 4 * 3
    assert SIZE // 4 - SLACK <= shop.fill("more") <= SIZE // 4
    shop.destroy()
    used(pool)
    shop.groups.reap()
    assert groups_of(pool) == set()


def groups_of(pool: Path) -> set[int]:
    """Return the numbers of the tenants' groups."""
    volume = os.open(pool, os.O_RDONLY)
    try:
        found = (btrfs.level_of(group) for group, _ in btrfs.groups(volume))
        return {number for level, number in found if level == 1}
    finally:
        os.close(volume)


def test_nothing_that_lives_is_removed(pool: Path) -> None:
    """Not the group of a disk just made, of which the kernel counts nothing yet, nor an operator's."""
    disk = made(pool, "shop")
    run("btrfs", "qgroup", "create", "1/77", pool)
    run("btrfs", "subvolume", "create", pool / "containers" / "new")
    own = btrfs.group(0, btrfs.subvolume(pool / "containers" / "new").number)
    disk.groups.reap()
    assert groups_of(pool) == {77, quotas.number_of(disk.identity)}
    volume = os.open(pool, os.O_RDONLY)
    try:
        assert own in {group for group, _ in btrfs.groups(volume)}
    finally:
        os.close(volume)
    assert list(disk.groups.lacking()) == ["new"]


def test_a_size_that_changes(pool: Path) -> None:
    disk = made(pool, "shop")
    disk.fill("file")
    disk.limit(2 * SIZE)
    assert disk.fill("more", SIZE // 2) == SIZE // 2
    disk.limit(0)
    assert disk.fill("most", SIZE) == SIZE
    disk.limit()
    assert disk.fill("any") == 0


def test_a_full_disk_has_slack_for_incus(pool: Path) -> None:
    """And no more by asking for it again; Incus's own limit is not in the way."""
    disk = made(pool, "shop")
    run("btrfs", "qgroup", "limit", str(SIZE), disk.volume)
    disk.fill("file")
    for number in range(3):
        run("btrfs", "filesystem", "sync", pool)
        disk.groups.limit(disk.name, disk.identity, SIZE, slack=True)
        disk.fill(f"more{number}")
    assert SIZE + quotas.SLACK - SLACK < disk.limit() <= SIZE + quotas.SLACK
    assert disk.fill("any") == 0


def test_slack_is_for_full_disks(pool: Path) -> None:
    disk = made(pool, "shop")
    disk.groups.limit(disk.name, disk.identity, SIZE * 2, slack=True)
    assert disk.fill("file", SIZE * 3) <= SIZE * 2


def test_a_group_that_another_process_removes_is_made_again(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for groups without a member, which a new one is."""
    disk = Disk(pool, "shop", str(uuid4()))
    run("btrfs", "subvolume", "create", disk.volume)
    disk.rootfs.mkdir()
    create, removed = btrfs.create, iter([True, True])

    def created(volume: int, group: int) -> None:
        create(volume, group)
        if next(removed, False):
            assert btrfs.destroy(volume, group)

    monkeypatch.setattr(btrfs, "create", created)
    disk.limit()
    assert SIZE - SLACK <= disk.fill("file") <= SIZE


def test_a_tenant_with_too_many_subvolumes_is_refused(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "_SUBVOLUMES_MAX", 3)
    disk = made(pool, "shop")
    for number in range(2):
        run("btrfs", "subvolume", "create", disk.rootfs / str(number))
    disk.limit()
    run("btrfs", "subvolume", "create", disk.rootfs / "more")
    with pytest.raises(OSError, match="more than 3 subvolumes"):
        disk.limit()


def test_a_full_disk_can_be_removed(pool: Path) -> None:
    """With subvolumes of its own, which the kernel removes only where there is room in the group."""
    disk = made(pool, "shop")
    for number in range(3):
        run("btrfs", "subvolume", "create", disk.rootfs / str(number))
    disk.snapshot("s")
    disk.limit()
    disk.fill("file")
    with pytest.raises(subprocess.CalledProcessError):
        disk.destroy()
    run("btrfs", "filesystem", "sync", pool)
    disk.groups.limit(disk.name, disk.identity, SIZE, slack=True)
    disk.destroy()


def test_many_groups_are_read_in_parts(pool: Path) -> None:
    wanted = {btrfs.group(1, number) for number in range(1, 300)}
    volume = os.open(pool, os.O_RDONLY)
    try:
        for group in wanted:
            btrfs.create(volume, group)
        assert wanted <= {group for group, _ in btrfs.groups(volume)}
    finally:
        os.close(volume)


def test_other_quotas_have_no_groups(tmp_path: Path) -> None:
    with mounted(tmp_path) as pool:
        quotas = Quotas(pool)
        assert (quotas.kind(), quotas.groups()) == ("off", None)
        run("btrfs", "quota", "enable", pool)
        assert (quotas.kind(), quotas.groups()) == ("full", None)
    assert (Quotas(tmp_path).kind(), Quotas(tmp_path).groups()) == (None, None)
