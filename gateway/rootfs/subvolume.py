"""Whether a tenant's root disk has changed since a snapshot: by the generations of btrfs subvolumes.

A subvolume's generation is the number of the transaction in which anything in it changed last. A snapshot has
that in which it was made, and its origin has no later one until it changes.
"""

from __future__ import annotations

import re
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
        return generation(volume) > generation(snapshot)
    except OSError:  # another file system, no such snapshot, or the workspace is not on the root disk
        return True


def generation(path: Path) -> int:
    """Return the generation of the subvolume at a path. Raises `OSError`."""
    return btrfs.subvolume(path).generation
