"""Find tenants, their files on the host, and their cgroups.

The broker does not trust requests for this. A request only names a tenant; incusd decides what is opened, and
with which ids, for an instance with our mark. For the `local` runtime it is a folder within the folder of all
tenants. Errors are meant for clients and contain no host paths.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import orjson

from gateway.errors import GatewayError, NotFound, Unavailable
from gateway.rootfs import IdMap, bridge_port, connections, process_tree, shown_folders
from gateway.rootfs.bridge_port import Port
from gateway.rootfs.instance_record import (
    COPY,
    folder_of,
    identity_of,
    idmap_of,
    is_marked,
    is_tenant,
    mounts_of,
    relative,
)
from gateway.rootfs.kernel import started
from gateway.rootfs.quotas import Quotas


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


# https://linuxcontainers.org/incus/docs/main/reference/instance_units/
_UNITS: Final = {
    **{unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB", "PB", "EB"))},
    **{unit: 1024**power for power, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))},
}


def size_of(text: str) -> int:
    """Parse a size in Incus's notation, such as 4GiB, into bytes; 0 if it is not one."""
    found = re.fullmatch(r"([0-9]+) ?([a-zA-Z]*)", text.strip())
    return 0 if found is None else int(found[1]) * _UNITS.get(found[2], 0)


_TIMEOUT = 5.0  # seconds, less than a gateway waits for an answer; usually milliseconds
_ANSWER_MAX = 4 << 20  # bytes of an instance


def ask_incus(at: str, path: str, most: int = _ANSWER_MAX, seconds: float = _TIMEOUT) -> Any:
    """Return what the incusd at a socket answers; None if the object does not exist. Raises `Unavailable`.

    An answer of over `most` bytes, or after so many `seconds`, is an error.
    """
    connection = _UnixConnection(at, seconds)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        said = orjson.loads(response.read(most))
        if response.status == 404:
            return None
        if response.status != 200:
            raise Unavailable("Incus refused to locate the tenant's files")
        return said["metadata"]
    except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as error:
        raise Unavailable("cannot ask Incus where the tenant's files are; is it running?") from error
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a unix socket."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("incus", timeout=seconds)
        self._path, self._seconds = path, seconds

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self._seconds)
        self.sock.connect(self._path)


_GROUP_AGE = 60.0  # seconds until incusd is asked again whether a running instance is still ours
_GROUPS_MAX = 1000
_DISKS_AT_ONCE = 50
_INSTANCES_MAX = 64 << 20  # bytes of all instances
_FREEING = 5.0  # seconds, less than a gateway waits for an answer
_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")  # an instance's, see Incus's shared/validate
_PART = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # a pool's or a volume's


class TenantLocator:
    """Locates a broker's tenants. Methods raise `NotFound` for other names, and `Unavailable`.

    Here they are without containers: they have files, and nothing else that needs root.
    """

    __slots__ = ()

    def disk(self, tenant: str, workspace: str) -> Disk:
        raise NotFound("no such tenant")

    def group(self, tenant: str) -> Path:
        """Return the cgroup (v2) of a running tenant's container."""
        raise NotFound("a tenant without a container has no cgroup")

    def network(self, tenant: str) -> tuple[int, str]:
        """Return a process in the network namespace of a running tenant, and the tenant's IPv4 address."""
        raise NotFound("a tenant without a container has no network")

    def ports(self, tenant: str) -> Sequence[Port]:
        """Return a tenant's current ports of the tenants' bridge."""
        raise NotFound("a tenant without a container has no ports")

    def pool(self) -> Path | None:
        """Return the mount point of the tenants' pool; None without one."""
        return None

    def limit_disk(self, instance: str, *, ending: bool = False, standby: bool = False) -> int | None:
        """Count and limit the disk of an instance of ours; return the bytes that count.

        One that does not run, or is `ending`, has slack for Incus. `standby` means the standby copy of that
        name, which is only counted. Does nothing and returns None in a pool without simple quotas, see
        `quotas`.
        """
        return None

    def limit_disks(self) -> int:
        """Limit disks that are not limited yet, at most some dozens; return how many."""
        return 0

    def free_disks(self) -> None:
        """Stop counting what was deleted, where disks are limited this way. Takes up to some seconds."""

    def release_folders(self) -> None:
        """Unmount the folders of the host that were shown to instances that are gone, see `shown_folders`."""

    def members(self) -> Collection[str]:
        """Return HOST:PORT of each member's Incus, none without a cluster. Raises `OSError`."""
        return ()


@dataclass(frozen=True, slots=True)
class Folders(TenantLocator):
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


class Instances(TenantLocator):
    """Tenants as containers of one Incus project; incusd is queried each time, only by GET.

    Only `workspace` is served, as its owner `uid`. `socket_path` is incusd's; its folder also contains the
    pools. `bridge` and `pool` are those of the tenants. Standby copies are in the
    project `standby`.
    """

    def __init__(
        self,
        socket_path: str,
        project: str,
        workspace: str,
        uid: int,
        bridge: str,
        pool: str,
        standby: str = "",
    ) -> None:
        self._socket = socket_path
        self._pools = f"{os.path.dirname(socket_path)}/storage-pools"
        self._project = project
        self._workspace = workspace
        self._uid = uid
        self._bridge = bridge
        self._pool = pool
        self._standby = standby
        self._groups: dict[str, _Group] = {}
        self._member = ""

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
            "standby": self._standby,
        }

    def disk(self, tenant: str, workspace: str) -> Disk:
        if workspace != self._workspace:
            raise Unavailable(
                "the broker serves a different workspace: set the same GATEWAY_WORKSPACE for both"
            )
        instance = self._instance(tenant)
        config = instance["config"]
        idmap = idmap_of(config.get("volatile.idmap.current") or config.get("volatile.idmap.next"))
        mounts = mounts_of(instance["expanded_devices"])
        above = max((at for at in mounts if _holds(at, workspace)), key=len, default=None)
        if above is None:
            raise Unavailable(f"tenant {tenant} has no root disk")
        name, device = mounts[above]
        covered = tuple(relative(at[len(workspace) :]) for at in mounts if at.startswith(workspace + "/"))
        read_only = device.get("readonly") in ("true", "1")
        inside = relative(workspace[len(above.rstrip("/")) :])
        if above == "/":
            path = f"{self._pools}/{_part(device['pool'])}/containers/{folder_of(instance)}/rootfs"
            # an empty last idmap means that the kernel maps ids at the mount, so they are unshifted on disk
            shifted, real = bool(idmap_of(config.get("volatile.last_state.idmap"))), False
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
        return path, bool(idmap_of(config.get("volatile.idmap.last")))

    def group(self, tenant: str) -> Path:
        known = self._groups.get(tenant)
        if known is not None and time.monotonic() < known.until and started(known.pid) == known.began:
            return known.path
        instance = self._instance(tenant, "recursion=1")
        pid = int((instance.get("state") or {}).get("pid") or 0)
        path, began = process_tree.of_init(pid) if pid > 0 else None, started(pid)
        # LXC's name of the cgroup, in case the pid of a container that has just ended was reused
        wanted = re.compile(rf"lxc\.payload\.{re.escape(folder_of(instance))}(-\d+)?")
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

    def pool(self) -> Path:
        return Path(self._pools, self._pool)

    def limit_disk(self, instance: str, *, ending: bool = False, standby: bool = False) -> int | None:
        if (groups := Quotas(self.pool()).groups()) is None:
            return None
        found = self._copy(instance) if standby else self._instance(instance, ours=True)
        disks = (one for one in found["expanded_devices"].values() if one.get("path") == "/")
        root: Mapping[str, str] = next(disks, {})
        if root.get("pool") != self._pool:
            return None
        identity, size = identity_of(found), root.get("size", "")
        former = identity_of(self._copy(instance)) if COPY in found["config"] and not standby else ""
        try:
            limit = 0 if standby else size_of(size)
            slack = ending or found.get("status") != "Running"
            return groups.limit(folder_of(found), identity, limit, slack=slack, former=former)
        except (OSError, ValueError) as error:
            words = error.strerror if isinstance(error, OSError) else "it has no id"
            raise Unavailable(f"the disk of {instance} cannot be limited: {words}") from error

    def limit_disks(self) -> int:
        if (groups := Quotas(self.pool()).groups()) is None:
            return 0
        done = 0
        for folder in groups.lacking():
            name = folder.rpartition("_")[2]
            if folder != folder_of({"name": name, "project": self._project}):
                continue  # another project's
            with contextlib.suppress(GatewayError):  # not one of ours, or just being made
                done += self.limit_disk(name) is not None
            if done == _DISKS_AT_ONCE:
                break
        return done

    def free_disks(self) -> None:
        if (groups := Quotas(self.pool()).groups()) is not None:
            groups.free(_FREEING)

    def release_folders(self) -> None:
        shown_folders.release(Path(self._socket).parent, self._identities)

    def _identities(self) -> set[str] | None:
        """Return the ids of all instances; None while Incus lists one without its configuration."""
        found = set()
        asks = f"/1.0/instances?recursion=1&project={quote(self._project, safe='')}"
        for instance in ask_incus(self._socket, asks, _INSTANCES_MAX) or ():
            if instance.get("config") is None:  # it is stopping (Incus 6.0.4)
                return None
            found.add(identity_of(instance))
        return found

    def members(self) -> Collection[str]:
        return connections.members(Path(self._socket).parent)

    def _instance(self, tenant: str, query: str = "", *, ours: bool = False) -> dict[str, Any]:
        """Return an instance that is a tenant. Raises `NotFound` for all others, existing or not.

        With `ours`, also one that is none yet or no more: in the pool, a golden copy, on a move.

        In a cluster, raises `Unavailable` for one on another server: its paths and ids mean others here.
        """
        found = None
        if _NAME.fullmatch(tenant):
            found = self._get(f"/1.0/instances/{quote(tenant)}", query)
        accepts = is_marked if ours else is_tenant
        if found is None or found.get("name") != tenant or not accepts(found):
            raise NotFound(f"no tenant {tenant[:100]}")
        location = found.get("location")
        if location not in (None, "", "none") and location != self._own_member():
            raise Unavailable(f"tenant {tenant} is on another server", reason="elsewhere", location=location)
        return {**found, "project": self._project}

    def _copy(self, tenant: str) -> dict[str, Any]:
        """Return the standby copy of a tenant that this server has. Raises `NotFound` and `Unavailable`."""
        found = None
        if self._standby and _NAME.fullmatch(tenant):
            found = self._get(f"/1.0/instances/{quote(tenant)}", project=self._standby)
        if found is None or found.get("location") != self._own_member():
            raise NotFound(f"no copy of {tenant[:100]}")
        return {**found, "project": self._standby}

    def _own_member(self) -> str:
        """Return the name of this server in its cluster. Asked once."""
        if not self._member:
            environment = (self._get("/1.0") or {}).get("environment") or {}
            self._member = str(environment.get("server_name"))
        return self._member

    def _get(self, path: str, query: str = "", project: str = "") -> dict[str, Any] | None:
        """Query incusd; None if the object does not exist. Raises `Unavailable`."""
        of = quote(project or self._project, safe="")
        found: dict[str, Any] | None = ask_incus(self._socket, f"{path}?project={of}&{query}")
        return found


@dataclass(frozen=True, slots=True)
class _Group:
    path: Path
    pid: int
    began: str
    until: float


def found_by(told: Mapping[str, Any]) -> TenantLocator:
    """Create the object described by `told`. Raises `KeyError`, `ValueError`."""
    if told["kind"] == "incus":
        names = ("socket", "project", "workspace", "uid", "bridge", "pool", "standby")
        return Instances(*(told[name] for name in names))
    idmap = tuple(IdMap(*line) for line in told["idmap"])
    return Folders(told["home"], told["below"], told["uid"], idmap)


def _holds(above: str, path: str) -> bool:
    return f"{path}/".startswith(above.rstrip("/") + "/")


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
