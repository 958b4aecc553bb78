"""Finds the tenants, their files on the host, and their control groups.

The broker trusts no request about that. A request names a tenant; incusd itself says what is opened, and with
which ids, for an instance that carries our mark. For the `local` runtime it is a folder in the one folder of
all tenants. Errors are for clients: they name no path of the host.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import orjson

from gateway.errors import NotFound, Unavailable
from gateway.rootfs import IdMap, bridge_port, process_tree
from gateway.rootfs.bridge_port import Port
from gateway.rootfs.kernel import started
from gateway.rootfs.quotas import Quotas

if TYPE_CHECKING:  # a broker has no use for the settings, which take it long to load
    from gateway.settings import Settings

MANAGED = "user.gateway.managed"  # the key that marks an instance as a tenant, see `is_tenant`

_INCUS_TIMEOUT = 5.0  # seconds, less than a gateway waits for an answer; it takes milliseconds
_ANSWER_MAX = 4 << 20  # bytes of an instance
_GROUP_AGE = 60.0  # seconds after which incusd is asked again whether a running instance is still ours
_GROUPS_MAX = 1000
_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")  # an instance's, see Incus's shared/validate
_PART = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # a pool's or a volume's


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk of a workspace. `path` is trusted; `inside` is the tenant's path below it, "" for none.

    `uid` and `gid` are the workspace's user inside, `idmap` the tenant's user namespace; empty if there is
    none. On disk, files carry ids of the inside, or of the outside where `shifted`. `covered` are the folders
    below the workspace, relative to it, over which the tenant has other disks, which are not served. With
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
        """Return the host's ids of a process that is `uid`:`gid` inside. Raises `ValueError` if unmapped."""
        if not self.idmap:
            return uid, gid
        return self._outside(uid, uid_map=True), self._outside(gid, uid_map=False)

    def _outside(self, inside: int, *, uid_map: bool) -> int:
        for line in self.idmap:
            if (line.is_uid if uid_map else line.is_gid) and line.inside <= inside < line.inside + line.size:
                return line.outside + inside - line.inside
        raise ValueError(f"id {inside} is not mapped")


class Tenants(Protocol):
    """Where a broker finds its tenants. Raises `NotFound` for what is none, `Unavailable`."""

    def disk(self, tenant: str, workspace: str) -> Disk: ...

    def group(self, tenant: str) -> Path:
        """Return the control group (v2) of a running tenant's container."""
        ...

    def network(self, tenant: str) -> tuple[int, str]:
        """Return a process in the network of a running tenant's container, and its IPv4 address there."""
        ...

    def ports(self, tenant: str) -> Sequence[Port]:
        """Return the ports of the tenants' bridge behind which a tenant's container is now."""
        ...

    def quotas(self) -> Quotas | None:
        """Return the quotas of the tenants' disks; None for folders, which have none."""
        ...


@dataclass(frozen=True, slots=True)
class Folders:
    """Tenants that are folders: `home`/TENANT/`below` is a tenant's `/`, with its files' owner.

    With `idmap`, the workspace's user is `uid` inside, and files have the ids of the inside.
    """

    home: str
    below: str = ""
    uid: int | None = None
    idmap: tuple[IdMap, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments by which another process makes an equal one, see `found_by`."""
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
        raise NotFound("a tenant without a container has no control group")

    def network(self, tenant: str) -> tuple[int, str]:
        raise NotFound("a tenant without a container has no network")

    def ports(self, tenant: str) -> Sequence[Port]:
        raise NotFound("a tenant without a container has no ports")

    def quotas(self) -> Quotas | None:
        return None


class Instances:
    """Tenants that are containers of one Incus project; incusd is asked each time, by GET alone.

    Only `workspace` is served, to its owner `uid`. `socket_path` is incusd's, in whose folder its pools lie.
    `bridge` and `pool` are those of the tenants.
    """

    def __init__(
        self, socket_path: str, project: str, workspace: str, uid: int, bridge: str, pool: str
    ) -> None:
        self._socket = socket_path
        self._pools = f"{os.path.dirname(socket_path)}/storage-pools"
        self._project = project
        self._workspace = workspace
        self._uid = uid
        self._bridge = bridge
        self._pool = pool
        self._groups: dict[str, _Group] = {}

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
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments by which another process makes an equal one, see `found_by`."""
        return {
            "kind": "incus",
            "socket": self._socket,
            "project": self._project,
            "workspace": self._workspace,
            "uid": self._uid,
            "bridge": self._bridge,
            "pool": self._pool,
        }

    def disk(self, tenant: str, workspace: str) -> Disk:
        if workspace != self._workspace:
            raise Unavailable(
                "this is not the workspace that the broker serves: give both the same GATEWAY_WORKSPACE"
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
            path = f"{self._pools}/{_part(device['pool'])}/containers/{self._folder(tenant)}/rootfs"
            # an empty last idmap means that the kernel maps ids at the mount: the disk holds them unshifted
            shifted, real = bool(_idmap(config.get("volatile.last_state.idmap"))), False
        elif device.get("pool"):
            path, shifted = self._volume(tenant, name, device)
            real = False
        else:
            path, shifted, real = device.get("source", ""), device.get("shift") not in ("true", "1"), True
            if not path.startswith("/"):
                raise _unsupported(tenant, name, "is no folder of the host")
        return Disk(path, inside, self._uid, self._uid, idmap, shifted, read_only, covered, real)

    def _volume(self, tenant: str, name: str, device: Mapping[str, str]) -> tuple[str, bool]:
        """Return where a device's custom volume lies, and whether its ids are shifted on disk."""
        pool, source = _part(device["pool"]), device.get("source", "")
        if not _PART.fullmatch(source):
            raise _unsupported(tenant, name, "is a part of a volume")
        volume = self._get(f"/1.0/storage-pools/{quote(pool)}/volumes/custom/{quote(source)}")
        config = (volume or {}).get("config") or {}
        if volume is None or volume.get("content_type") != "filesystem":
            raise _unsupported(tenant, name, "is no volume of files")
        if config.get("security.unmapped") in ("true", "1"):
            raise _unsupported(tenant, name, "is a volume without a map of ids")
        path = f"{self._pools}/{pool}/custom/{_part(volume['project'])}_{source}"
        if not os.path.isdir(path):
            raise _unsupported(tenant, name, "is not mounted on the host, or not on this one")
        return path, bool(_idmap(config.get("volatile.idmap.last")))

    def group(self, tenant: str) -> Path:
        known = self._groups.get(tenant)
        if known is not None and time.monotonic() < known.until and started(known.pid) == known.began:
            return known.path
        pid = int((self._instance(tenant, "recursion=1").get("state") or {}).get("pid") or 0)
        path, began = process_tree.of_init(pid) if pid > 0 else None, started(pid)
        # LXC's name for it: what took the number of a container that has just ended is none of ours
        wanted = re.compile(rf"lxc\.payload\.{re.escape(self._folder(tenant))}(-\d+)?")
        if path is None or not began or not wanted.fullmatch(path.name):
            raise NotFound(f"tenant {tenant} does not run")
        if len(self._groups) >= _GROUPS_MAX:
            self._groups.clear()
        self._groups[tenant] = _Group(path, pid, began, time.monotonic() + _GROUP_AGE)
        return path

    def network(self, tenant: str) -> tuple[int, str]:
        self.group(tenant)  # it runs, and is ours
        devices = self._instance(tenant)["expanded_devices"].values()
        nics = (device.get("ipv4.address", "") for device in devices if device.get("type") == "nic")
        address = next(filter(None, nics), None)
        if address is None:
            raise NotFound(f"tenant {tenant} has no address of its own")
        return self._groups[tenant].pid, str(address)

    def ports(self, tenant: str) -> Sequence[Port]:
        return [*bridge_port.ports(self._instance(tenant)["config"], self._bridge)]

    def quotas(self) -> Quotas:
        return Quotas(Path(self._pools, self._pool))

    def _folder(self, tenant: str) -> str:
        return tenant if self._project == "default" else f"{self._project}_{tenant}"

    def _instance(self, tenant: str, query: str = "") -> dict[str, Any]:
        """Return an instance of ours. Raises `NotFound` for another's as for one that is not there."""
        found = None
        if _NAME.fullmatch(tenant):
            found = self._get(f"/1.0/instances/{quote(tenant)}", query)
        if found is None or found.get("name") != tenant or not is_tenant(found):
            raise NotFound(f"no tenant {tenant[:100]}")
        return found

    def _get(self, path: str, query: str = "") -> dict[str, Any] | None:
        """Ask incusd; None if there is no such object. Raises `Unavailable`."""
        connection = _Connection(self._socket)
        try:
            connection.request("GET", f"{path}?project={quote(self._project, safe='')}&{query}")
            response = connection.getresponse()
            said = orjson.loads(response.read(_ANSWER_MAX))
            if response.status == 404:
                return None
            if response.status != 200:
                raise Unavailable("Incus refused to say where the tenant's files are")
            metadata: dict[str, Any] = said["metadata"]
            return metadata
        except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as error:
            raise Unavailable("Incus cannot be asked where the tenant's files are; is it running?") from error
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class _Group:
    path: Path
    pid: int
    began: str
    until: float


class _Connection(http.client.HTTPConnection):
    """One request to a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("incus", timeout=_INCUS_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_INCUS_TIMEOUT)
        self.sock.connect(self._path)


def found_by(told: Mapping[str, Any]) -> Tenants:
    """Make what `told` describes. Raises `KeyError`, `ValueError`."""
    if told["kind"] == "incus":
        names = ("socket", "project", "workspace", "uid", "bridge", "pool")
        return Instances(*(told[name] for name in names))
    idmap = tuple(IdMap(*line) for line in told["idmap"])
    return Folders(told["home"], told["below"], told["uid"], idmap)


def is_tenant(instance: Mapping[str, Any]) -> bool:
    """Tell whether an instance, as Incus shows it, is a tenant: a container with the mark."""
    # one that is just being made has no expanded configuration yet
    expanded = instance.get("expanded_config") or {}
    return instance.get("type") == "container" and expanded.get(MANAGED) == "true"


def _idmap(text: str | None) -> tuple[IdMap, ...]:
    return tuple(
        IdMap(line["Isuid"], line["Isgid"], line["Nsid"], line["Hostid"], line["Maprange"])
        for line in orjson.loads(text or "[]") or ()
    )


def _mounts(devices: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, Mapping[str, str]]]:
    """Return the disks that a container sees, as name and device by their paths inside."""
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
        raise Unavailable("Incus named a storage of an unknown kind")
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
