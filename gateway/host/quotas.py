"""The disk quotas of the tenants' pool, for setup and doctor; see `gateway.rootfs.quotas`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection
from typing import Final

from gateway.host import HostError
from gateway.rootfs.quotas import SIMPLE, Kind, Quotas
from gateway.settings import Settings

_PROGRAMS: Final = (6, 7)  # the btrfs-progs that know simple quotas; Incus runs them


def in_force(settings: Settings) -> bool:
    """Return whether the kernel enforces the pool's quotas; a pool of folders has none."""
    return _of(settings).in_force()


def kind(settings: Settings) -> Kind | None:
    """Return which quotas the pool has, None for a pool of folders."""
    return _of(settings).kind()


def unlimited(settings: Settings, tenants: Collection[str]) -> list[str]:
    """Return which of these tenants no limit counts for, in a pool with simple quotas. Needs root."""
    if (groups := _of(settings).groups()) is None:
        return []
    own = settings.incus_project
    folders = {tenant if own == "default" else f"{own}_{tenant}": tenant for tenant in tenants}
    return [folders[folder] for folder in groups.lacking() if folder in folders]


def enforce(settings: Settings) -> str | None:
    """Enforce the quotas, wait until they are in force, and return what was changed. Raises `HostError`.

    A pool that has no quotas yet gets simple ones, if this host can have them.
    """
    found, changed = _of(settings), list[str]()
    try:
        if found.kind() == "off" and wanted(settings):
            found.begin_simple()
            changed.append("simple ones: what a tenant writes counts for it")
        changed += found.enforce(wait=True)
    except OSError as error:
        raise HostError(
            f"cannot enforce the disk quotas: {error.strerror}; see `btrfs quota rescan -s` and the "
            "kernel log"
        ) from None
    return "; ".join(changed) or None


def wanted(settings: Settings) -> bool:
    """Return whether a new pool gets simple quotas on this host."""
    if not settings.simple_quotas or (btrfs := shutil.which("btrfs")) is None:
        return False
    said = subprocess.run([btrfs, "--version"], check=False, capture_output=True, text=True).stdout
    return can_be_simple(os.uname().release, said)


def can_be_simple(linux: str, programs: str) -> bool:
    """Return whether the Linux of a release, and btrfs-progs by the version they tell, have simple quotas."""
    return _version(linux) >= SIMPLE and _version(programs) >= _PROGRAMS


def _version(text: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


def _of(settings: Settings) -> Quotas:
    return Quotas(settings.incus_socket.parent / "storage-pools" / settings.pool)
