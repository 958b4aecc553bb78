"""Keep the disk quotas of a btrfs pool in force.

A pool has one of two kinds. Simple quotas count an extent for the subvolume that wrote it, which costs next
to nothing; `disk_groups` makes limits of them. Full quotas count what each subvolume has, for which the
kernel finds out who shares each extent that changes.

Full ones may end by themselves: when a subvolume with a large tree is deleted, such as a tenant's, the kernel
may stop accounting (since Linux 6.1, for trees of at least `drop_subtree_threshold` levels). Then no tenant
has a quota until a rescan, and nothing reports it. The threshold belongs to a mount and is 3 by default, so
it must be set again for every mount: after a reboot, and whenever incusd was restarted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final, Literal

from gateway.rootfs import btrfs
from gateway.rootfs.disk_groups import DiskGroups, number_of

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
