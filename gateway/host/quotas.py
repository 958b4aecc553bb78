"""Keeps the disk quotas of a btrfs pool in force.

When a subvolume with a large tree is deleted, such as a tenant's, the kernel may stop counting what each one
uses (since Linux 6.1, from `drop_subtree_threshold` levels on; 3 by default). Then no tenant has a quota
until everything is counted again, and nothing reports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from gateway.host import run
from gateway.settings import Settings

_NEVER: Final = "8"  # as many levels as no tree has (BTRFS_MAX_LEVEL)
_SYSFS: Final = Path("/sys/fs/btrfs")


def in_force(settings: Settings, sysfs: Path = _SYSFS) -> bool:
    """Say whether the pool's quotas hold, as far as that can be known; folders have none."""
    counting = _counting(settings, sysfs)
    return counting is None or _read(counting / "inconsistent") != "1"


def enforce(settings: Settings, sysfs: Path = _SYSFS) -> str | None:
    """Have the kernel count on, and count again if it had stopped; return what was changed."""
    counting = _counting(settings, sysfs)
    if counting is None:
        return None
    said = []
    threshold = counting / "drop_subtree_threshold"
    if _read(threshold) not in (None, _NEVER):
        threshold.write_text(_NEVER)  # of the mounted file system: it does not outlast a reboot
        said.append("they stay in force when tenants are deleted")
    if not in_force(settings, sysfs):
        run(
            ["btrfs", "quota", "rescan", "-w", _path(settings)],
            fix="see `btrfs quota rescan -s` and the kernel's log",
        )
        said.append("what each tenant uses was counted again")
    return "; ".join(said) or None


def _path(settings: Settings) -> Path:
    return settings.incus_socket.parent / "storage-pools" / settings.pool


def _counting(settings: Settings, sysfs: Path) -> Path | None:
    """Return the kernel's folder of the pool's quotas, None if there is none."""
    path = _path(settings)
    if not path.is_mount():
        return None
    identity = run(["findmnt", "--noheadings", "--output=UUID", "--mountpoint", path], fix="").strip()
    counting = sysfs / identity / "qgroups"
    return counting if identity and counting.is_dir() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
