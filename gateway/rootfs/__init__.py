"""Safe access to a workspace whose every byte and name a hostile tenant controls.

`FilesystemRoot` names a tenant's files; `Workers` runs operations on them, each tenant's in processes of its
own. Only the broker finds out where they are on the host.

Parts: `kernel` (raw calls), `root` (safe paths), `worker` (the loop), `confine` (what a worker gives up),
`locations` (where each tenant's files are), `broker` and `zygote` (start workers), `broker_client`, `workers`
and `links` (the gateway's side). All but the gateway's side run inside a worker too, so nothing here imports
more than it needs, and `Workers` is loaded when it is first asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """A tenant's files: those below `workspace`, an absolute path inside the tenant.

    `state` changes when the same name means other files, or files with other ids: a worker that was opened on
    another state is not used. `prefix` is what the tenant's own commands see before each path: empty, except
    for `local` tenants, whose commands see the host's path.
    """

    tenant: str
    workspace: str
    state: str = ""
    prefix: str = ""
