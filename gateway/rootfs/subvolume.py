"""Whether a tenant's root disk has changed since a snapshot: by the generations of btrfs subvolumes.

A subvolume's generation is the number of the transaction in which anything in it changed last. A snapshot has
that in which it was made, and its origin has no later one until it changes. Incus itself changes it with each
snapshot that it takes or deletes: it describes them in a file beside the root disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gateway.rootfs import btrfs

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9.-]{0,62}")  # of a snapshot of ours


def changed(rootfs: str, since: str) -> bool:
    """Return whether an instance's root disk has changed since its snapshot of a name, or may have.

    `rootfs` is its path in a pool of Incus. Raises `ValueError` for what cannot be a snapshot's name.
    """
    if not _NAME.fullmatch(since):
        raise ValueError("not the name of a snapshot")
    volume = Path(rootfs).parent
    # POOL/containers/INSTANCE/rootfs
    snapshot = volume.parent.parent / "containers-snapshots" / volume.name / since
    try:
        then = generation(snapshot)
        if generation(volume) <= then:
            return False
        ours = incus(volume)
        return any(inode not in ours for inode in written(volume, then))
    except OSError:  # another file system, no such snapshot, or the workspace is not on the root disk
        return True


def generation(path: Path) -> int:
    """Return the generation of the subvolume at a path. Raises `OSError`."""
    return btrfs.subvolume(path).generation


def written(path: Path, since: int) -> Iterator[int]:
    """Yield the inodes of the subvolume at a path that have changed after a generation. Raises `OSError`."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield from btrfs.written(folder, since)
    finally:
        os.close(folder)


def incus(volume: Path) -> set[int]:
    """Return the inodes of what Incus alone writes in a volume: folder and the instance's description."""
    return {btrfs.FIRST, os.lstat(volume / "backup.yaml").st_ino}
