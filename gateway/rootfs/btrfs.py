"""Subvolumes of a btrfs, their quota groups, and what changed in them, by ioctls.

Numbers and structures are those of linux/btrfs.h and linux/btrfs_tree.h. `volume` is the descriptor of any
folder of the file system. Except for `subvolume`, the calls need root. All raise `OSError`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SYSFS: Final = Path("/sys/fs/btrfs")
# Bytes. By itself the kernel reads 4 MiB ahead in btrfs, thirty times as far as elsewhere. Tenants share the
# extents of their image, but each reads them into memory of its own: to start each of 200 read 115 MiB, most
# of which was not needed. The value belongs to a mount, so it is set after each mount.
READ_AHEAD: Final = 128 << 10
ENABLE_SIMPLE: Final = 4  # BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA

FIRST: Final = 256  # the id of the first subvolume, and the inode number of each one's folder
_LEVEL: Final = 48  # the bits of a group's id below its level
_MOST: Final = (1 << 64) - 1

# objects of the trees, and kinds of items
_TREE_OF_ROOTS, _TREE_OF_QUOTAS = 1, 8
_ORPHANS: Final = (1 << 64) - 5
_INODE, _ORPHAN, _ROOT, _ROOT_REF, _GROUP_INFO, _GROUP_RELATION = 1, 48, 132, 156, 242, 246

_READ, _WRITE = 2, 1  # the direction of an ioctl
_KEY: Final = struct.Struct("=7Q4I4Q")  # struct btrfs_ioctl_search_key; the items follow
_COUNT: Final = struct.Struct("=I")
_COUNT_AT: Final = 64
_HEADER: Final = struct.Struct("=3Q2I")  # transid, objectid, offset, type, length of the item that follows
_SEARCH_BYTES: Final = 4096
_INFO: Final = struct.Struct("=Q256x8x8xQ")  # treeid, name, parent_id, dirid, generation, …
_INFO_BYTES: Final = 504
_TRANSID: Final = struct.Struct("=8xQ")  # of an inode, after the generation that made it
_REFERENCED: Final = struct.Struct("=8xQ")  # after the generation
LIMIT_REFERENCED: Final = 1


def _ioctl(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0x94 << 8 | number


_SYNC: Final = 0x94 << 8 | 8
_FS_INFO: Final = _ioctl(_READ, 31, 1024)
_FS_ID: Final = slice(16, 32)  # after max_id and num_devices
_TREE_SEARCH: Final = _ioctl(_READ | _WRITE, 17, _SEARCH_BYTES)
_QUOTA_CTL: Final = _ioctl(_READ | _WRITE, 40, 16)
_GROUP_ASSIGN: Final = _ioctl(_WRITE, 41, 24)
_GROUP_CREATE: Final = _ioctl(_WRITE, 42, 16)
_GROUP_LIMIT: Final = _ioctl(_READ, 43, 48)
_GET_SUBVOL_INFO: Final = _ioctl(_READ, 60, _INFO_BYTES)


@dataclass(frozen=True, slots=True)
class Subvolume:
    """A subvolume; `generation` is the number of the transaction in which anything in it changed last.

    A snapshot has that in which it was made, and its origin has no later one until it changes.
    """

    number: int
    generation: int


def subvolume(path: Path) -> Subvolume:
    """Return the subvolume whose folder is at a path; not being one is an error, too."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(folder).st_ino != FIRST:
            raise OSError(errno.EINVAL, "not a subvolume")
        told = bytearray(_INFO_BYTES)
        fcntl.ioctl(folder, _GET_SUBVOL_INFO, told)
    finally:
        os.close(folder)
    return Subvolume(*_INFO.unpack_from(told))


def written(volume: int, generation: int) -> Iterator[int]:
    """Yield the numbers of the subvolume's inodes that have changed after a transaction.

    So has a folder in which something was made, renamed or removed. What was not committed yet may be missed.
    """
    key, last = (0, 0, 0), (_MOST, 255, _MOST)
    while True:
        told = bytearray(_SEARCH_BYTES)
        of, kind, offset = key
        later = (0, of, last[0], offset, last[2], generation + 1, _MOST)  # 0: the subvolume's own tree
        _KEY.pack_into(told, 0, *later, kind, last[1], _MOST >> 32, 0, 0, 0, 0, 0)
        fcntl.ioctl(volume, _TREE_SEARCH, told)
        count, at = _COUNT.unpack_from(told, _COUNT_AT)[0], _KEY.size
        if not count:
            return
        for _ in range(count):  # all of each node that has changed
            _, of, offset, kind, length = _HEADER.unpack_from(told, at)
            at += _HEADER.size
            if kind == _INODE and length and _TRANSID.unpack_from(told, at)[0] > generation:
                yield of
            at += length
        if offset < _MOST:
            key = of, kind, offset + 1
        else:
            key = (of, kind + 1, 0) if kind < last[1] else (of + 1, 0, 0)


def exists(volume: int, number: int) -> bool:
    """Return whether there is a subvolume of a number, or one that is still being deleted."""
    return any(_items(volume, _TREE_OF_ROOTS, number, _ROOT))


def nested(volume: int, number: int) -> Iterator[int]:
    """Yield the subvolumes directly below a subvolume."""
    for found, _ in _items(volume, _TREE_OF_ROOTS, number, _ROOT_REF):
        yield found


def deleted(volume: int) -> Iterator[int]:
    """Yield the subvolumes that are deleted, but not freed yet."""
    for found, _ in _items(volume, _TREE_OF_ROOTS, _ORPHANS, _ORPHAN):
        yield found


def commit(volume: int) -> None:
    """Commit the transaction, and have the kernel begin to free what was deleted."""
    fcntl.ioctl(volume, _SYNC)


def in_sysfs(mounted: Path, sysfs: Path = SYSFS) -> Path | None:
    """Return the sysfs folder of the file system mounted at a path, None for another one than btrfs."""
    if not mounted.is_mount():
        return None
    folder = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        told = fcntl.ioctl(folder, _FS_INFO, bytes(1024))
    except OSError:  # another file system
        return None
    finally:
        os.close(folder)
    return sysfs / str(uuid.UUID(bytes=told[_FS_ID]))


def enable_simple_quotas(volume: int) -> None:
    """Enable simple quotas on a file system that has no quotas yet. Linux 6.7."""
    fcntl.ioctl(volume, _QUOTA_CTL, bytearray(struct.pack("=2Q", ENABLE_SIMPLE, 0)))


# --- quota groups ---------------------------------------------------------------------------------------


def group(level: int, number: int) -> int:
    """Return the id of a quota group, LEVEL/NUMBER; those of level 0 are the subvolumes' own."""
    return level << _LEVEL | number


def level_of(group: int) -> tuple[int, int]:
    """Return level and number of a group."""
    return group >> _LEVEL, group & ((1 << _LEVEL) - 1)


def groups(volume: int) -> Iterator[tuple[int, int]]:
    """Yield all groups, each with the bytes counted at the last commit."""
    for found, data in _items(volume, _TREE_OF_QUOTAS, 0, _GROUP_INFO):
        yield found, int(_REFERENCED.unpack_from(data)[0])


def relatives(volume: int, group: int) -> Iterator[int]:
    """Yield the groups that a group is a member of, and its own members; those have a lower level."""
    for found, _ in _items(volume, _TREE_OF_QUOTAS, group, _GROUP_RELATION):
        yield found


def create(volume: int, group: int) -> None:
    """Create a group; nothing happens if it exists."""
    with contextlib.suppress(FileExistsError):
        fcntl.ioctl(volume, _GROUP_CREATE, struct.pack("=2Q", 1, group))


def destroy(volume: int, group: int) -> bool:
    """Destroy a group; return False if the kernel still needs it, or it is gone."""
    try:
        fcntl.ioctl(volume, _GROUP_CREATE, struct.pack("=2Q", 0, group))
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOENT):
            raise
        return False
    return True


def assign(volume: int, member: int, group: int) -> bool:
    """Make one group a member of another, with all that it counts; return False if one does not exist."""
    try:
        fcntl.ioctl(volume, _GROUP_ASSIGN, struct.pack("=3Q", 1, member, group))
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
        return False
    return True


def limit(volume: int, group: int, size: int) -> None:
    """Limit the bytes of a group; 0 removes the limit."""
    fcntl.ioctl(volume, _GROUP_LIMIT, struct.pack("=6Q", group, LIMIT_REFERENCED, size or _MOST, 0, 0, 0))


def _items(volume: int, tree: int, of: int, kind: int) -> Iterator[tuple[int, bytes]]:
    """Yield the items of an object in a tree that are of a kind: each one's offset and data."""
    first = 0
    while True:
        told = bytearray(_SEARCH_BYTES)
        _KEY.pack_into(told, 0, tree, of, of, first, _MOST, 0, _MOST, kind, kind, _MOST >> 32, 0, 0, 0, 0, 0)
        fcntl.ioctl(volume, _TREE_SEARCH, told)
        count, at = _COUNT.unpack_from(told, _COUNT_AT)[0], _KEY.size
        if not count:
            return
        for _ in range(count):
            _, _, offset, _, length = _HEADER.unpack_from(told, at)
            at += _HEADER.size
            yield offset, bytes(told[at : at + length])
            at += length
        if offset == _MOST:
            return
        first = offset + 1


_SNAPSHOT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9.-]{0,62}")  # of a snapshot of ours


def changed_since(rootfs: str, since: str) -> bool:
    """Return whether an instance's root disk has changed since its snapshot of a name, or may have.

    `rootfs` is its path in a pool of Incus. Raises `ValueError` for what cannot be a snapshot's name.
    """
    if not _SNAPSHOT.fullmatch(since):
        raise ValueError("not the name of a snapshot")
    volume = Path(rootfs).parent
    # POOL/containers/INSTANCE/rootfs
    snapshot = volume.parent.parent / "containers-snapshots" / volume.name / since
    try:
        then = generation(snapshot)
        if generation(volume) <= then:
            return False
        ours = written_by_incus(volume)
        return any(inode not in ours for inode in written_since(volume, then))
    except OSError:  # another file system, no such snapshot, or the workspace is not on the root disk
        return True


def generation(path: Path) -> int:
    """Return the generation of the subvolume at a path. Raises `OSError`."""
    return subvolume(path).generation


def written_since(path: Path, since: int) -> Iterator[int]:
    """Yield the inodes of the subvolume at a path that have changed after a generation. Raises `OSError`."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield from written(folder, since)
    finally:
        os.close(folder)


def written_by_incus(volume: Path) -> set[int]:
    """Return the inodes of what Incus alone writes in a volume: folder and the instance's description."""
    return {FIRST, os.lstat(volume / "backup.yaml").st_ino}


def bound_read_ahead(pool: Path, sysfs: Path = SYSFS) -> str:
    """Have the kernel read at most `READ_AHEAD` bytes ahead in a btrfs pool; return what was changed, if any.

    A smaller value is left as it is, and so is any that the kernel does not let us change. Needs root.
    """
    with contextlib.suppress(OSError):
        folder = in_sysfs(pool, sysfs)
        if folder is None:
            return ""
        setting = folder / "bdi" / "read_ahead_kb"
        before, wanted = int(setting.read_text()), READ_AHEAD >> 10
        if before > wanted:
            setting.write_text(str(wanted))
            return f"the kernel reads {wanted} KiB ahead in the tenants' pool, not {before}"
    return ""
