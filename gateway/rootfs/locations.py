"""Find tenants, their files on the host, and their cgroups.

The broker does not trust requests for this. A request only names a tenant; incusd decides what is opened, and
with which ids, for an instance with our mark. For the `local` runtime it is a folder within the folder of all
tenants. Errors are meant for clients and contain no host paths.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import orjson

from gateway.errors import NotFound, Unavailable
from gateway.rootfs import IdMap, asking, bridge_port, dead_members, fence, process_tree
from gateway.rootfs.bridge_port import Port
from gateway.rootfs.kernel import started
from gateway.rootfs.quotas import Quotas

if TYPE_CHECKING:  # a broker does not need the settings, which are slow to load
    from gateway.settings import Settings

MANAGED = "user.gateway.managed"  # the key that marks an instance as a tenant, see `is_tenant`

_GROUP_AGE = 60.0  # seconds until incusd is asked again whether a running instance is still ours
_GROUPS_MAX = 1000
_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")  # an instance's, see Incus's shared/validate
_PART = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # a pool's or a volume's


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


class Tenants(Protocol):
    """Locates a broker's tenants. Methods raise `NotFound` for other names, and `Unavailable`."""

    def disk(self, tenant: str, workspace: str) -> Disk: ...

    def group(self, tenant: str) -> Path:
        """Return the cgroup (v2) of a running tenant's container."""
        ...

    def network(self, tenant: str) -> tuple[int, str]:
        """Return a process in the network namespace of a running tenant, and the tenant's IPv4 address."""
        ...

    def ports(self, tenant: str) -> Sequence[Port]:
        """Return a tenant's current ports of the tenants' bridge."""
        ...

    def fence(self, tenant: str, *, frozen: bool) -> None:
        """Freeze or thaw the container of that name without asking incusd, see `fence`."""
        ...

    def quotas(self) -> Quotas | None:
        """Return the quotas of the tenants' disks; None for folders, which have none."""
        ...

    def members(self) -> Collection[str]:
        """Return HOST:PORT of each member's Incus, none without a cluster. Raises `OSError`."""
        ...


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
        return Disk(path, _relative(workspace), uid, gid, self.idmap)

    def group(self, tenant: str) -> Path:
        raise NotFound("a tenant without a container has no cgroup")

    def network(self, tenant: str) -> tuple[int, str]:
        raise NotFound("a tenant without a container has no network")

    def ports(self, tenant: str) -> Sequence[Port]:
        raise NotFound("a tenant without a container has no ports")

    def fence(self, tenant: str, *, frozen: bool) -> None:
        raise NotFound("a tenant without a container cannot be frozen")

    def quotas(self) -> Quotas | None:
        return None

    def members(self) -> Collection[str]:
        return ()


class Instances:
    """Tenants as containers of one Incus project; incusd is queried each time, only by GET.

    Only `workspace` is served, as its owner `uid`. `socket_path` is incusd's; its folder also contains the
    pools. `bridge` and `pool` are those of the tenants. Those that were brought back are in the project
    `second`, while another member may have an instance of their name in `project`.
    """

    def __init__(
        self,
        socket_path: str,
        project: str,
        workspace: str,
        uid: int,
        bridge: str,
        pool: str,
        second: str = "",
    ) -> None:
        self._socket = socket_path
        self._pools = f"{os.path.dirname(socket_path)}/storage-pools"
        self._project = project
        self._workspace = workspace
        self._uid = uid
        self._bridge = bridge
        self._pool = pool
        self._second = second
        self._groups: dict[str, _Group] = {}
        self._member = ""

    @classmethod
    def of(cls, settings: Settings) -> Instances:
        """Return the tenants of a gateway with these settings."""
        return cls(
            str(settings.incus_socket),
            settings.incus_project,
            settings.workspace,
            settings.workspace_uid,
            settings.network,
            settings.pool,
            settings.failover_project,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a description from which `found_by` makes an equal object in another process."""
        return {
            "kind": "incus",
            "socket": self._socket,
            "project": self._project,
            "workspace": self._workspace,
            "uid": self._uid,
            "bridge": self._bridge,
            "pool": self._pool,
            "second": self._second,
        }

    def disk(self, tenant: str, workspace: str) -> Disk:
        if workspace != self._workspace:
            raise Unavailable(
                "the broker serves a different workspace: set the same GATEWAY_WORKSPACE for both"
            )
        instance = self._instance(tenant)
        config = instance["config"]
        idmap = _idmap(config.get("volatile.idmap.current") or config.get("volatile.idmap.next"))
        mounts = _mounts(instance["expanded_devices"])
        above = max((at for at in mounts if _holds(at, workspace)), key=len, default=None)
        if above is None:
            raise Unavailable(f"tenant {tenant} has no root disk")
        name, device = mounts[above]
        covered = tuple(_relative(at[len(workspace) :]) for at in mounts if at.startswith(workspace + "/"))
        read_only = device.get("readonly") in ("true", "1")
        inside = _relative(workspace[len(above.rstrip("/")) :])
        if above == "/":
            path = f"{self._pools}/{_part(device['pool'])}/containers/{_folder(instance)}/rootfs"
            # an empty last idmap means that the kernel maps ids at the mount, so they are unshifted on disk
            shifted, real = bool(_idmap(config.get("volatile.last_state.idmap"))), False
        elif device.get("pool"):
            path, shifted = self._volume(tenant, name, device)
            real = False
        else:
            path, shifted, real = device.get("source", ""), device.get("shift") not in ("true", "1"), True
            if not path.startswith("/"):
                raise _unsupported(tenant, name, "is not a folder of the host")
        return Disk(path, inside, self._uid, self._uid, idmap, shifted, read_only, covered, real)

    def _volume(self, tenant: str, name: str, device: Mapping[str, str]) -> tuple[str, bool]:
        """Return the path of a device's custom volume, and whether ids are shifted on disk."""
        pool, source = _part(device["pool"]), device.get("source", "")
        if not _PART.fullmatch(source):
            raise _unsupported(tenant, name, "is only part of a volume")
        volume = self._get(f"/1.0/storage-pools/{quote(pool)}/volumes/custom/{quote(source)}")
        config = (volume or {}).get("config") or {}
        if volume is None or volume.get("content_type") != "filesystem":
            raise _unsupported(tenant, name, "is not a filesystem volume")
        if config.get("security.unmapped") in ("true", "1"):
            raise _unsupported(tenant, name, "is a volume without an id map")
        path = f"{self._pools}/{pool}/custom/{_part(volume['project'])}_{source}"
        if not os.path.isdir(path):
            raise _unsupported(tenant, name, "is not mounted on this host")
        return path, bool(_idmap(config.get("volatile.idmap.last")))

    def group(self, tenant: str) -> Path:
        known = self._groups.get(tenant)
        if known is not None and time.monotonic() < known.until and started(known.pid) == known.began:
            return known.path
        instance = self._instance(tenant, "recursion=1")
        pid = int((instance.get("state") or {}).get("pid") or 0)
        path, began = process_tree.of_init(pid) if pid > 0 else None, started(pid)
        # LXC's name of the cgroup, in case the pid of a container that has just ended was reused
        wanted = re.compile(rf"lxc\.payload\.{re.escape(_folder(instance))}(-\d+)?")
        if path is None or not began or not wanted.fullmatch(path.name):
            raise NotFound(f"tenant {tenant} is not running")
        if len(self._groups) >= _GROUPS_MAX:
            self._groups.clear()
        self._groups[tenant] = _Group(path, pid, began, time.monotonic() + _GROUP_AGE)
        return path

    def network(self, tenant: str) -> tuple[int, str]:
        self.group(tenant)  # checks that it is running and ours
        devices = self._instance(tenant)["expanded_devices"].values()
        nics = (device.get("ipv4.address", "") for device in devices if device.get("type") == "nic")
        address = next(filter(None, nics), None)
        if address is None:
            raise NotFound(f"tenant {tenant} has no fixed address")
        return self._groups[tenant].pid, str(address)

    def ports(self, tenant: str) -> Sequence[Port]:
        return [*bridge_port.ports(self._instance(tenant)["config"], self._bridge)]

    def fence(self, tenant: str, *, frozen: bool) -> None:
        if not _NAME.fullmatch(tenant):
            raise NotFound(f"no tenant {tenant[:100]}")
        step = fence.freeze if frozen else fence.thaw
        folder = _folder({"name": tenant, "project": self._project_of(tenant)})
        step(Path(self._socket).parent, folder)

    def quotas(self) -> Quotas:
        return Quotas(Path(self._pools, self._pool))

    def members(self) -> Collection[str]:
        return dead_members.members(Path(self._socket).parent)

    def _instance(self, tenant: str, query: str = "") -> dict[str, Any]:
        """Return an instance that is a tenant. Raises `NotFound` for all others, existing or not.

        In a cluster, raises `Unavailable` for one on another server: its paths and ids mean others here.
        """
        found, project = None, self._project_of(tenant)
        if _NAME.fullmatch(tenant):
            found = self._get(f"/1.0/instances/{quote(tenant)}", query, project)
        if found is None or found.get("name") != tenant or not is_tenant(found):
            raise NotFound(f"no tenant {tenant[:100]}")
        location = found.get("location")
        if location not in (None, "", "none") and location != self._own_member():
            raise Unavailable(f"tenant {tenant} is on another server", reason="elsewhere", location=location)
        return {**found, "project": project}

    def _project_of(self, tenant: str) -> str:
        """Return the project of a tenant of this server, by Incus's link to each instance that is here.

        To ask for a name whose instance is on a member that is away takes Incus longer than a client waits.
        """
        link = f"{os.path.dirname(self._socket)}/containers/{self._second}_{tenant}"
        return self._second if self._second and os.path.lexists(link) else self._project

    def _own_member(self) -> str:
        """Return the name of this server in its cluster. Asked once."""
        if not self._member:
            environment = (self._get("/1.0") or {}).get("environment") or {}
            self._member = str(environment.get("server_name"))
        return self._member

    def _get(self, path: str, query: str = "", project: str = "") -> dict[str, Any] | None:
        """Query incusd; None if the object does not exist. Raises `Unavailable`."""
        of = quote(project or self._project, safe="")
        return asking.get(self._socket, f"{path}?project={of}&{query}")


@dataclass(frozen=True, slots=True)
class _Group:
    path: Path
    pid: int
    began: str
    until: float


def found_by(told: Mapping[str, Any]) -> Tenants:
    """Create the object described by `told`. Raises `KeyError`, `ValueError`."""
    if told["kind"] == "incus":
        names = ("socket", "project", "workspace", "uid", "bridge", "pool", "second")
        return Instances(*(told[name] for name in names))
    idmap = tuple(IdMap(*line) for line in told["idmap"])
    return Folders(told["home"], told["below"], told["uid"], idmap)


def is_tenant(instance: Mapping[str, Any]) -> bool:
    """Return whether an instance, as reported by Incus, is a tenant: a container with our mark."""
    # an instance being created has no expanded configuration yet
    expanded = instance.get("expanded_config") or {}
    return instance.get("type") == "container" and expanded.get(MANAGED) == "true"


def _folder(instance: Mapping[str, Any]) -> str:
    """Return an instance's name in host paths."""
    name, project = str(instance["name"]), instance["project"]
    return name if project == "default" else f"{project}_{name}"


def _idmap(text: str | None) -> tuple[IdMap, ...]:
    return tuple(
        IdMap(line["Isuid"], line["Isgid"], line["Nsid"], line["Hostid"], line["Maprange"])
        for line in orjson.loads(text or "[]") or ()
    )


def _mounts(devices: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, Mapping[str, str]]]:
    """Return the names and devices of a container's disks by their paths inside."""
    return {
        "/" + _relative(os.path.normpath(device["path"])): (name, device)
        for name, device in devices.items()
        if device.get("type") == "disk" and device.get("path")
    }


def _holds(above: str, path: str) -> bool:
    return f"{path}/".startswith(above.rstrip("/") + "/")


def _relative(path: str) -> str:
    return path.strip("/")


def _part(name: object) -> str:
    if not isinstance(name, str) or not _PART.fullmatch(name) or name in (".", ".."):
        raise Unavailable("Incus reported a storage name of an unknown kind")
    return name


def _unsupported(tenant: str, device: str, why: str) -> Unavailable:
    name = device[:100]
    return Unavailable(
        f"the workspace of {tenant} is the disk device {name}, which {why}: the file tools cannot open it; "
        "use Bash",
        reason="device",
        device=name,
    )


__all__ = ["MANAGED", "Disk", "Folders", "Instances", "Tenants", "found_by", "is_tenant"]
