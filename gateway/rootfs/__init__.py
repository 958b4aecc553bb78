"""Safe access to a workspace in which a hostile tenant controls every byte and every name.

`FilesystemRoot` identifies a tenant's files; `workers.Workers` runs operations on them in separate processes
per tenant. Only the broker knows where the files are on the host.

Parts: `kernel` (raw calls), `root` (safe paths), `worker` (the loop), `confine` (how a worker is confined),
`locations` (where each tenant's files are), `broker` and `zygote` (start workers), `broker_client`, `workers`
and `links` (the gateway's side). The broker runs as root, so what it imports has a budget: `kernel`,
`messages`, `confine` and what locates tenants, but nothing that only workers or the gateway need.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FilesystemRoot", "IdMap"]


@dataclass(frozen=True, slots=True)
class IdMap:
    """A line of a user namespace's map: `size` ids from `inside` on are those from `outside` on the host."""

    is_uid: bool
    is_gid: bool
    inside: int
    outside: int
    size: int


@dataclass(frozen=True, slots=True)
class FilesystemRoot:
    """A tenant's files: those below `workspace`, an absolute path inside the tenant.

    `state` changes when the same name refers to different files, or to files with different ids; a worker
    with another state is not reused. `prefix` precedes each path as the tenant's own commands see it: empty,
    except for `local` tenants, whose commands see host paths.
    """

    tenant: str
    workspace: str
    state: str = ""
    prefix: str = ""
