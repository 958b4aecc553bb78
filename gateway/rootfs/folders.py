"""Tenants as folders, those of the `local` runtime."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.errors import NotFound
from gateway.rootfs import IdMap
from gateway.rootfs.bridge_port import Port
from gateway.rootfs.disk import Disk, relative
from gateway.rootfs.quotas import Quotas

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Folders:
    """Tenants as folders: `home`/TENANT/`below` is a tenant's `/`; its owner owns the files.

    With `idmap`, the workspace's user is `uid` inside, and files have inside ids.
    """

    home: str
    below: str = ""
    uid: int | None = None
    idmap: tuple[IdMap, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a description from which `found_by` makes an equal object in another process."""
        lines = [[m.is_uid, m.is_gid, m.inside, m.outside, m.size] for m in self.idmap]
        return {"kind": "folders", "home": self.home, "below": self.below, "uid": self.uid, "idmap": lines}

    def disk(self, tenant: str, workspace: str) -> Disk:
        if tenant in ("", ".", "..") or "/" in tenant or "\0" in tenant:
            raise NotFound("no such tenant")
        path = f"{self.home}/{tenant}/{self.below}".rstrip("/")
        try:
            owner = os.stat(path, follow_symlinks=False)
        except OSError:
            raise NotFound("no such tenant") from None
        uid, gid = (owner.st_uid, owner.st_gid) if self.uid is None else (self.uid, self.uid)
        return Disk(path, relative(workspace), uid, gid, self.idmap)

    def group(self, tenant: str) -> Path:
        raise NotFound("a tenant without a container has no cgroup")

    def network(self, tenant: str) -> tuple[int, str]:
        raise NotFound("a tenant without a container has no network")

    def ports(self, tenant: str) -> Sequence[Port]:
        raise NotFound("a tenant without a container has no ports")

    def quotas(self) -> Quotas | None:
        return None

    def read_ahead(self, most: int) -> str:
        return ""

    def limit_disk(self, instance: str, *, ending: bool = False, standby: bool = False) -> int | None:
        return None

    def limit_disks(self) -> int:
        return 0

    def free_disks(self) -> None:
        pass

    def release_folders(self) -> None:
        pass

    def members(self) -> Collection[str]:
        return ()
