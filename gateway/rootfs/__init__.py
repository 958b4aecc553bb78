"""Safe access to a workspace whose every byte and name a hostile tenant controls.

`FilesystemRoot` says where a tenant's files are; `Workers` runs operations on them, each tenant's in
processes of its own. Host paths stay in this package and in the runtime that made them.

Parts: `kernel` (raw calls), `tree` (safe paths), `worker` (the loop), `confine` (what a worker gives up),
`broker` (starts workers), `workers` (the gateway's side). All but the last run inside a worker too, so
nothing here imports more than it needs, and `Workers` is loaded when it is first asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.rootfs.workers import Workers

__all__ = ["FilesystemRoot", "IdMap", "Workers"]


def __getattr__(name: str) -> object:
    if name != "Workers":
        raise AttributeError(name)
    from gateway.rootfs.workers import Workers

    return Workers


@dataclass(frozen=True, slots=True)
class IdMap:
    """One line of a user namespace: `size` ids from `inside` are `outside` on the host."""

    is_uid: bool
    is_gid: bool
    inside: int
    outside: int
    size: int


@dataclass(frozen=True, slots=True)
class FilesystemRoot:
    """How to reach a tenant's files from the host. The path never leaves the gateway.

    `path` holds the container's `/`. `workspace` is absolute inside it, owned by `uid`:`gid` (ids
    inside). `idmap` is the tenant's user namespace; empty where there is none (`local`). On disk, files
    carry ids of the inside, or of the outside where `shifted`.
    """

    tenant: str
    path: Path
    workspace: str
    uid: int
    gid: int
    idmap: tuple[IdMap, ...] = ()
    shifted: bool = False

    def on_disk(self, uid: int, gid: int) -> tuple[int, int]:
        """Return the host's ids for a file that `uid`:`gid` (inside) owns, as written through `path`."""
        if not self.shifted:
            return uid, gid
        return self._outside(uid, uid_map=True), self._outside(gid, uid_map=False)

    def outside(self, uid: int, gid: int) -> tuple[int, int]:
        """Return the host's ids of a process that is `uid`:`gid` inside. Raises `ValueError` if unmapped."""
        if not self.idmap:
            return uid, gid
        return self._outside(uid, uid_map=True), self._outside(gid, uid_map=False)

    def _outside(self, inside: int, *, uid_map: bool) -> int:
        for line in self.idmap:
            if (line.is_uid if uid_map else line.is_gid) and line.inside <= inside < line.inside + line.size:
                return line.outside + inside - line.inside
        raise ValueError(f"id {inside} is not mapped")
