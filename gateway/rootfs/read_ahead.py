"""Bound how far the kernel reads ahead in the tenants' pool.

For btrfs it reads 4 MiB ahead, thirty times as far as elsewhere. Tenants share the extents of their image,
but each reads them into memory of its own. To start each of 200 read 115 MiB so, most of which nobody wanted;
once memory was full of it, everything took longer. The value belongs to a mount, so it is set after each.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from gateway.rootfs import btrfs


def bound(pool: Path, most: int, sysfs: Path = btrfs.SYSFS) -> str:
    """Have the kernel read at most so many bytes ahead in a btrfs pool; return what was changed, if anything.

    Less than that is left as it is, and so is all by 0, or where the kernel does not let us. Needs root.
    """
    with contextlib.suppress(OSError):
        folder = btrfs.in_sysfs(pool, sysfs) if most > 0 else None
        if folder is None:
            return ""
        setting = folder / "bdi" / "read_ahead_kb"
        before, wanted = int(setting.read_text()), max(4, most >> 10)
        if before > wanted:
            setting.write_text(str(wanted))
            return f"the kernel reads {wanted} KiB ahead in the tenants' pool, not {before}"
    return ""
