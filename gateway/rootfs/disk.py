"""Where the files of a workspace are on the host, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.rootfs import IdMap


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk of a workspace. `path` is trusted; `inside` is the tenant's path below it, "" for none.

    `uid` and `gid` are the workspace's user inside the tenant, `idmap` is the tenant's user namespace, empty
    if it has none. On disk, files have inside ids, or outside ids if `shifted`. `covered` are folders
    relative to the workspace over which the tenant has mounted other disks, which are not served. With
    `real`, no part of `path` may be a link.
    """

    path: str
    inside: str
    uid: int
    gid: int
    idmap: tuple[IdMap, ...] = ()
    shifted: bool = False
    read_only: bool = False
    covered: tuple[str, ...] = ()
    real: bool = False

    def outside(self, uid: int, gid: int) -> tuple[int, int]:
        """Return the host ids of `uid`:`gid` inside the tenant. Raises `ValueError` if unmapped."""
        if not self.idmap:
            return uid, gid
        return self._outside(uid, uid_map=True), self._outside(gid, uid_map=False)

    def _outside(self, inside: int, *, uid_map: bool) -> int:
        for line in self.idmap:
            if (line.is_uid if uid_map else line.is_gid) and line.inside <= inside < line.inside + line.size:
                return line.outside + inside - line.inside
        raise ValueError(f"id {inside} is not mapped")


def relative(path: str) -> str:
    """Return an absolute path as one below `/`."""
    return path.strip("/")
