"""Folders of the host that are shown to tenants while they move in: where they are mounted, and their end.

A mount is named after its instance's id, so that no later tenant of the same name gets it, and lies below a
folder of its incusd. `gateway.migration` makes it. It goes with the instance, whoever deletes that.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from gateway.rootfs.kernel import checked

PLACES: Final = Path("/run/incus-gateway-migrate")
_DETACH, _NO_FOLLOW = 2, 8  # umount2(2)

_umount2 = ctypes.CDLL(None, use_errno=True).umount2


def place(incus: Path, identity: str = "") -> Path:
    """Return where the folder of an instance of the incusd in `incus` is mounted; without id, that of all."""
    return PLACES / str(incus).strip("/").replace("/", "-") / identity


def mounts(where: Path) -> list[set[str]]:
    """Return the options of each mount at a place, the one that is seen last."""
    with Path("/proc/self/mountinfo").open("rb") as table:
        fields = (line.split() for line in table)
        return [set(os.fsdecode(one[5]).split(",")) for one in fields if one[4] == os.fsencode(where)]


def unmount(where: Path) -> None:
    """Take the mounts at a place away; what still uses one keeps it until it ends. Idempotent.

    Needs root. Raises `OSError`.
    """
    for _ in mounts(where):
        checked(_umount2(os.fsencode(where), _DETACH | _NO_FOLLOW), f"umount {where}")
    if where.is_dir():
        where.rmdir()


def release(incus: Path, identities: Callable[[], Collection[str] | None]) -> None:
    """Unmount the folders of instances that no longer exist. Needs root. Raises `OSError`.

    `identities` returns the ids of all instances, or None if it cannot say. It is called only if there is any
    folder, and after these were listed: each is mounted for an instance that exists.
    """
    try:
        found = list(place(incus).iterdir())
    except FileNotFoundError:
        return
    if found and (alive := identities()) is not None:
        for where in found:
            if where.name not in alive:
                unmount(where)
