"""Shows a folder of the host to one tenant, by a mount that maps its owner and no other id.

Incus's own `shift=true` would map every id, root too: root in the container could then write into the folder
as root of the host, and a set-uid file there would be a way to become it. In this mount only the folder's
owner is the workspace's user inside. All other ids are unmapped: what root in the container creates is
refused (EOVERFLOW), and others' files stay others'. The mount is private, so no mount of the container comes
out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.host import HostError, run

PLACES: Final = Path("/run/incus-gateway-migrate")
_FIX: Final = (
    "mount (util-linux) 2.39 or later and a file system that takes a map of ids (ext4, xfs, btrfs, tmpfs) "
    "are needed; the old site keeps running"
)


@dataclass(frozen=True, slots=True)
class Owner:
    """The ids on disk that the workspace's user has inside."""

    uid: int
    gid: int


def place(tenant: str) -> Path:
    """Return where a tenant's view of its folder is mounted."""
    return PLACES / tenant


def open_door(tenant: str, folder: Path, owner: Owner, inside: Owner, *, read_only: bool) -> Path:
    """Mount `folder` with the ids of `owner` shown as the host's ids `inside`. Idempotent."""
    where = place(tenant)
    if is_open(tenant):
        return where
    where.mkdir(mode=0o711, parents=True, exist_ok=True)
    options = ["bind", "nosuid", "nodev"]
    options += ["ro"] if read_only else []
    options.append(f"X-mount.idmap=u:{owner.uid}:{inside.uid}:1 g:{owner.gid}:{inside.gid}:1")
    try:
        run(["mount", "-o", ",".join(options), "--", folder, where], fix=_FIX)
        run(["mount", "--make-private", "--", where], fix=_FIX)
    except HostError:
        close_door(tenant)
        raise
    return where


def close_door(tenant: str) -> None:
    """Take the mount away; what still uses it keeps it until it ends. Idempotent."""
    where = place(tenant)
    while is_open(tenant):
        run(["umount", "--lazy", "--", where], fix=f"see what uses {where}")
    if where.is_dir():
        where.rmdir()


def is_open(tenant: str) -> bool:
    """Say whether a tenant's view of its folder is mounted."""
    where = os.fsencode(place(tenant))
    with Path("/proc/self/mountinfo").open("rb") as table:
        return any(line.split()[4] == where for line in table)


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
