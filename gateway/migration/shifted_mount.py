"""Shows a folder of the host to one tenant, by a mount that maps its owner and no other id.

Incus's own `shift=true` would map every id, root too: root in the container could then write into the folder
as root of the host, and a set-uid file there would be a way to become it. In this mount only the folder's
owner is the workspace's user inside. All other ids are unmapped: what root in the container creates is
refused (EOVERFLOW), and others' files stay others'. The mount is private, so no mount of the container comes
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.host import HostError, run
from gateway.rootfs.shown_folders import mounts, unmount

_FIX: Final = (
    "mount (util-linux) 2.39 or later and a file system that takes a map of ids (ext4, xfs, btrfs, tmpfs) "
    "are needed; the old site keeps running"
)


@dataclass(frozen=True, slots=True)
class Owner:
    """The ids on disk that the workspace's user has inside."""

    uid: int
    gid: int


def open_door(where: Path, folder: Path, owner: Owner, inside: Owner, *, read_only: bool) -> None:
    """Mount `folder` with the ids of `owner` shown as the host's ids `inside`.

    Idempotent; a mount that shows anything else is replaced. Raises `HostError`.
    """
    if shows(where, folder, inside, read_only=read_only):
        return
    close_door(where)
    for folder_of_mounts in (where.parent, where):
        folder_of_mounts.mkdir(mode=0o711, parents=True, exist_ok=True)
    options = ["bind", "nosuid", "nodev"]
    options += ["ro"] if read_only else []
    options.append(f"X-mount.idmap=u:{owner.uid}:{inside.uid}:1 g:{owner.gid}:{inside.gid}:1")
    try:
        run(["mount", "-o", ",".join(options), "--", folder, where], fix=_FIX)
        run(["mount", "--make-private", "--", where], fix=_FIX)
        if not shows(where, folder, inside, read_only=read_only):
            raise HostError(
                f"{folder} does not belong to {owner.uid}:{owner.gid} any more; give it back to them, or "
                "undo the migration with --back"
            )
    except HostError:
        close_door(where)
        raise


def shows(where: Path, folder: Path, inside: Owner, *, read_only: bool) -> bool:
    """Return whether exactly this folder is mounted, with its owner shown as `inside`, and in this mode."""
    found = mounts(where)
    if len(found) != 1 or not found[0] >= {"nosuid", "nodev", "idmapped", "ro" if read_only else "rw"}:
        return False
    try:
        there, here = where.stat(), folder.stat()
    except OSError:
        return False
    same = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
    return same and (there.st_uid, there.st_gid) == (inside.uid, inside.gid)


def close_door(where: Path) -> None:
    """Take the mount away; what still uses it keeps it until it ends. Idempotent. Raises `HostError`."""
    try:
        unmount(where)
    except OSError as error:
        raise HostError(f"{error.strerror}; see what uses {where}") from error


def inside(config: Mapping[str, Any], uid: int) -> Owner:
    """Return the host's ids of a user of an instance, by its configuration. Raises `HostError`."""
    found: dict[str, int] = {}
    known = config.get("volatile.idmap.current") or config.get("volatile.idmap.next") or "[]"
    for line in orjson.loads(known) or ():
        if line["Nsid"] <= uid < line["Nsid"] + line["Maprange"]:
            host = line["Hostid"] + uid - line["Nsid"]
            found |= {kind: host for kind, key in (("uid", "Isuid"), ("gid", "Isgid")) if line[key]}
    if found.keys() != {"uid", "gid"}:
        raise HostError(
            "Incus reports no id map for this tenant; a site cannot move into a privileged container"
        )
    return Owner(found["uid"], found["gid"])
