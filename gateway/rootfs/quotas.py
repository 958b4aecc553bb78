"""Count and limit the tenants' disks in a btrfs pool, by one of two kinds of quotas.

Full quotas count what each subvolume has, for which the kernel finds out who shares each extent that changes.
They may end by themselves: when a subvolume with a large tree is deleted, such as a tenant's, the kernel may
stop accounting (since Linux 6.1, for trees of at least `drop_subtree_threshold` levels). Then no tenant has a
quota until a rescan, and nothing reports it. The threshold belongs to a mount and is 3 by default, so it must
be set again for every mount: after a reboot, and whenever incusd was restarted.

Simple quotas count an extent for the subvolume that wrote it, which costs next to nothing, for as long as any
has it, even if the one that wrote it is deleted. A restore gives a tenant a new subvolume, made from a
snapshot, whose own count begins at 0. So all subvolumes of a tenant are members of one quota group, whose
count is the sum of theirs and which has the limit. The kernel keeps deleted ones in it until nothing of
theirs is left, and adds those that a tenant creates below its own.

A group is numbered after its instance's id, `volatile.uuid`. So it stays the same when the tenant is
restored, renamed or moved, and a copy of the tenant has another one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final, Literal
from uuid import UUID

from gateway.rootfs import btrfs

SIMPLE: Final = (6, 8)
"""The Linux from which on simple quotas count what is written by deleted subvolumes, too.

Before, the group of a living subvolume could be removed, which Incus tries when it deletes one.
"""

_NEVER: Final = "8"  # more levels than any tree has (BTRFS_MAX_LEVEL)

# linux/btrfs.h: numbers of ioctls, by direction, size, type and number
_RESCAN: Final = (1 << 30) | (64 << 16) | (0x94 << 8) | 44
_RESCAN_WAIT: Final = (0x94 << 8) | 46


Kind = Literal["simple", "full", "off"]


class Quotas:
    """The disk quotas of the pool mounted at `path`, which may have none."""

    def __init__(self, path: Path, sysfs: Path = btrfs.SYSFS) -> None:
        self._path = path
        self._sysfs = sysfs

    def kind(self) -> Kind | None:
        """Return which quotas the pool has, None if it can have none."""
        if (counting := self._counting()) is None:
            return None if self._kernels() is None else "off"
        return "simple" if _read(counting / "mode") == "squota" else "full"

    def groups(self) -> DiskGroups | None:
        """Return the groups by which a pool with simple quotas limits disks, None for another pool."""
        if (counting := self._counting()) is None or _read(counting / "mode") != "squota":
            return None
        return DiskGroups(self._path, counting)

    def limit_of(self, folder: str, identity: str) -> int | None:
        """Return the bytes that an instance's disk may have, None if nothing limits it.

        Raises `LookupError` for a pool without quotas, `ValueError` for an `identity` that is no UUID, and
        `OSError`; needs root.
        """
        if (counting := self._counting()) is None:
            raise LookupError("this pool has no quotas")
        own = btrfs.group(0, btrfs.subvolume(self._path / "containers" / folder).number)
        volume = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            ours = {btrfs.group(1, number_of(identity))} & set(btrfs.relatives(volume, own))
        finally:
            os.close(volume)
        found = []
        for level, number in map(btrfs.level_of, (own, *ours)):
            group = counting / f"{level}_{number}"
            if int(_read(group / "limit_flags") or 0) & btrfs.LIMIT_REFERENCED:
                found.append(int(_read(group / "max_referenced") or 0))
        return min(found, default=None)

    def begin_simple(self) -> None:
        """Enable simple quotas on a btrfs pool without quotas. Raises `OSError`; needs root."""
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            btrfs.enable_simple_quotas(folder)
        finally:
            os.close(folder)

    def in_force(self) -> bool:
        """Return whether the quotas are enforced, as far as the kernel tells; True for a pool without any."""
        counting = self._counting()
        return counting is None or _read(counting / "inconsistent") != "1"

    def enforce(self, *, wait: bool = False) -> list[str]:
        """Make the kernel keep accounting, and rescan if it has stopped; return what was changed.

        Simple quotas are always in force; of these, the groups of deleted disks are removed. Returns during
        the rescan, unless `wait` is set. Raises `OSError`; needs root.
        """
        changed = list[str]()
        if (counting := self._counting()) is None:
            return changed
        if (groups := self.groups()) is not None:
            groups.reap()
            return changed
        threshold = counting / "drop_subtree_threshold"
        if _read(threshold) not in (None, _NEVER):
            threshold.write_text(_NEVER)
            changed.append("they stay in force when tenants are deleted")
        if _read(counting / "inconsistent") == "1" and self._recount(wait=wait):
            changed.append("what each tenant uses was counted again")
        return changed

    def _counting(self) -> Path | None:
        """Return the sysfs folder of the pool's quotas, or None."""
        folder = self._kernels()
        return None if folder is None or not (folder / "qgroups").is_dir() else folder / "qgroups"

    def _kernels(self) -> Path | None:
        return btrfs.in_sysfs(self._path, self._sysfs)

    def _recount(self, *, wait: bool) -> bool:
        """Start a rescan; return False if one is already running."""
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            began = True
            try:
                fcntl.ioctl(folder, _RESCAN, struct.pack("<64x"))
            except OSError as error:
                if error.errno != errno.EINPROGRESS:
                    raise
                began = False
            if wait:
                fcntl.ioctl(folder, _RESCAN_WAIT)
            return began or wait
        finally:
            os.close(folder)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


SLACK: Final = 16 << 20
"""The bytes beyond the limit for Incus, which cannot start or tidy an instance whose disk is full."""

_LEVEL: Final = 1
_OURS: Final = 1 << 47  # set in the number of each group of a tenant, and not in those made by hand
_SUBVOLUMES_MAX: Final = 5000  # of one tenant, which may create as many as it likes
_LOOK: Final = 0.02  # seconds
_TRIES: Final = 5  # a new group without a member may be removed by another process


def number_of(identity: str) -> int:
    """Return the number of an instance's group. 47 bits are random. Raises `ValueError` for no UUID."""
    return _OURS | int(UUID(identity).hex[:12], 16)


class DiskGroups:
    """The groups of the pool of Incus mounted at `pool`; `counting` is the kernel's folder of its quotas.

    Needs root. Methods raise `OSError`.
    """

    def __init__(self, pool: Path, counting: Path) -> None:
        self._pool, self._counting = pool, counting

    def limit(self, folder: str, identity: str, size: int, *, slack: bool = False, former: str = "") -> int:
        """Count and limit all subvolumes of an instance as one; return the bytes that count.

        `folder` is the instance's in the pool, `size` the limit in bytes, 0 for none. With `slack`, a full
        disk has room for what Incus writes to it. What the instance `former` has written counts, too. Repeat
        it whenever Incus may have made a subvolume.
        """
        group = btrfs.group(_LEVEL, number_of(identity))
        with self._volume() as volume:
            found = list(islice(self._subvolumes(volume, folder), _SUBVOLUMES_MAX + 1))
            subvolumes = found[:_SUBVOLUMES_MAX]
            if former:
                subvolumes += self._members(volume, btrfs.group(_LEVEL, number_of(former)))
            for _ in range(_TRIES):
                if self._join(volume, subvolumes, group):
                    break
            else:
                raise OSError(errno.EAGAIN, "the group keeps disappearing")
            counted = self._number(group, "referenced")
            self._set(volume, group, size + SLACK if size and slack and counted > size - SLACK else size)
            # that of Incus, which would be another one with slack
            self._set(volume, btrfs.group(0, subvolumes[0]), 0)
            if len(found) > _SUBVOLUMES_MAX:
                raise OSError(errno.EMLINK, f"it has more than {_SUBVOLUMES_MAX} subvolumes")
            return counted

    def lacking(self) -> Iterator[str]:
        """Yield the folders of instances whose disk counts in no group."""
        with self._volume() as volume:
            for place in sorted((self._pool / "containers").iterdir()):
                with contextlib.suppress(OSError):  # it is just being removed
                    own = btrfs.group(0, btrfs.subvolume(place).number)
                    if not any(map(_is_ours, btrfs.relatives(volume, own))):
                        yield place.name

    def free(self, patience: float) -> None:
        """Make the kernel free what was deleted; by itself it takes up to half a minute.

        Returns once all of it is counted no more, or after `patience` seconds.
        """
        until = time.monotonic() + patience
        with self._volume() as volume:
            btrfs.commit(volume)
            left = set(btrfs.deleted(volume))
            while left and time.monotonic() < until:
                time.sleep(_LOOK)  # the kernel has no event for it before Linux 6.13
                left &= set(btrfs.deleted(volume))
            btrfs.commit(volume)

    def reap(self) -> int:
        """Remove the groups of deleted disks of which nothing is left; return how many."""
        removed = 0
        with self._volume() as volume:
            for group, size in list(btrfs.groups(volume)):
                level, number = btrfs.level_of(group)
                if not level and not size and number >= btrfs.FIRST and not btrfs.exists(volume, number):
                    removed += btrfs.destroy(volume, group)
            for group, _ in list(btrfs.groups(volume)):
                if _is_ours(group) and not any(btrfs.relatives(volume, group)):
                    removed += btrfs.destroy(volume, group)
        return removed

    @contextlib.contextmanager
    def _volume(self) -> Iterator[int]:
        volume = os.open(self._pool, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield volume
        finally:
            os.close(volume)

    def _subvolumes(self, volume: int, folder: str) -> Iterator[int]:
        """Yield the numbers of an instance's subvolumes: its disk, its snapshots, and what is below these."""
        # what a move receives, a snapshot has written
        snapshots = self._pool / "containers-snapshots" / folder
        kept = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
        left = deque([btrfs.subvolume(self._pool / "containers" / folder).number])
        for snapshot in kept:
            with contextlib.suppress(OSError):  # it is just being removed
                left.append(btrfs.subvolume(snapshot).number)
        while left:
            yield (one := left.popleft())
            # restored ones were below theirs before that was in the group
            left.extend(islice(btrfs.nested(volume, one), _SUBVOLUMES_MAX))

    def _members(self, volume: int, group: int) -> Iterator[int]:
        """Yield the numbers of the subvolumes that are in a group, also of deleted ones."""
        for level, number in map(btrfs.level_of, btrfs.relatives(volume, group)):
            if not level:
                yield number

    def _join(self, volume: int, subvolumes: list[int], group: int) -> bool:
        """Make subvolumes members of a group; return False if it has disappeared meanwhile."""
        btrfs.create(volume, group)
        for one in subvolumes:
            own = btrfs.group(0, one)
            if group in btrfs.relatives(volume, own) or btrfs.assign(volume, own, group):
                continue
            if btrfs.exists(volume, one):
                return False
        return True

    def _set(self, volume: int, group: int, size: int) -> None:
        """Set a group's limit in bytes, 0 for none, if it has another one."""
        limited = self._number(group, "limit_flags") & btrfs.LIMIT_REFERENCED
        if size != (self._number(group, "max_referenced") if limited else 0):
            btrfs.limit(volume, group, size)

    def _number(self, group: int, what: str) -> int:
        level, number = btrfs.level_of(group)
        return int((self._counting / f"{level}_{number}" / what).read_text())


def _is_ours(group: int) -> bool:
    level, number = btrfs.level_of(group)
    return level == _LEVEL and bool(number & _OURS)
