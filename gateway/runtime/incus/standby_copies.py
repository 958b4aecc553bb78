"""Copies of tenants on other members of the cluster, in an Incus project of their own.

A copy has the tenant's name and disk, and as a value the rest of what makes it the tenant: it has no network
and no profile, and is never started as it is. `revive` makes the tenant of it again, where the copy is.

Facts about incusd that shape this module (measured on 6.0.4, three members):

- A copy to another member moves only what changed since the latest snapshot that both have: 0.7 s for 5 MB.
  Without one it moves all of the disk each time. So each copy begins with a snapshot of the tenant, and the
  one before is deleted once the copy has this one too.
- A refresh leaves the copy's configuration as it was.
- A member that is away keeps the names of its instances until it is removed from the cluster.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

from gateway.errors import Conflict, GatewayError, NotFound
from gateway.incus import Incus, IncusError
from gateway.incus.client import instance_path
from gateway.rootfs.instance_record import COPY, identity_of
from gateway.runtime import TenantInstance
from gateway.runtime.incus.creation import STATIC
from gateway.runtime.incus.disks import OURS, Disks
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.records import Instance
from gateway.runtime.incus.runtime import IncusRuntime
from gateway.settings import Settings

log = logging.getLogger(__name__)

_KEY: Final = COPY
"""On a copy: what it is of, as JSON; see `Replica`."""
_INSTANCE: Final = "user.gateway.standby.instance"
"""On a copy: the configuration, devices and profiles of the tenant's instance, as JSON."""
_AUTOSTART: Final = "user.gateway.standby.autostart"
"""On a tenant with a copy: what its `boot.autostart` was, which is false now.

The gateway starts it after a power cut, once it has asked whether this server was removed meanwhile.
"""
COPY_TIMEOUT: Final = 900.0  # seconds, since the first copy transfers the whole disk
_UNSET: Final = "unset"
_LATE_FILE: Final = "standby-late"
"""In the state dir: the tenants whose copies are late, for `doctor`."""
_SNAPSHOT: Final = f"{OURS}standby-"
_PLACE: Final = (STATIC, "boot.autostart", _AUTOSTART)
_FEATURES: Final = ("images", "profiles", "storage.volumes", "storage.buckets", "networks", "networks.zones")


@dataclass(frozen=True, slots=True)
class Replica:
    """A copy of a tenant as it was `at`, in seconds since the epoch; `instance` is the tenant's instance id.

    `home` is the member that had the tenant, `running` whether it ran.
    """

    tenant: str
    instance: str
    home: str
    at: float
    running: bool

    @property
    def snapshot(self) -> str:
        """The name of the snapshot with which the copy was made, on the tenant and on the copy."""
        return f"{_SNAPSHOT}{round(self.at * 1000)}"

    def of(self, snapshot: str) -> Replica:
        """Return it as of another snapshot of that tenant. Raises `ValueError` if it is not ours."""
        return replace(self, at=int(snapshot.removeprefix(_SNAPSHOT)) / 1000)


class Replicas:
    """The copies of a cluster. An async context manager."""

    def __init__(self, settings: Settings, runtime: IncusRuntime) -> None:
        self._settings, self._runtime = settings, runtime
        self._incus, self._disks = runtime.incus, Disks(settings, runtime.incus)
        self._copies = Incus(settings.incus_socket, settings.standby_project, settings.incus_timeout)
        self._disks_of_copies = Disks(settings, self._copies)

    async def __aenter__(self) -> Self:
        await self._copies.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._copies.__aexit__(kind, error, trace)

    async def here(self) -> Sequence[Replica]:
        """Return the copies that this member has. Raises `Unavailable`."""
        with translated(""):
            try:
                found = await self._copies.own("/1.0/instances", recursion="1")
            except IncusError as error:
                if error.status == 404:  # no tenant was ever copied
                    return ()
                raise
        return [copy for instance in found if (copy := _copy_of(instance)) is not None]

    async def space(self, member: str) -> tuple[int, int]:
        """Return total and used bytes of a member's storage pool. Raises `Unavailable`."""
        with translated(""):
            path = f"/1.0/storage-pools/{self._settings.pool}/resources"
            found = (await self._incus.get(path, target=member))["space"]
        return int(found["total"]), int(found["used"])

    async def count(self, tenant: str, snapshot: str) -> None:
        """Count what a copy on this member has received for the tenant, in case that is brought back.

        Call it before the next one comes, whose refresh removes the snapshot that has written it. Does
        nothing for a `snapshot` that is no copy's. Raises `GatewayError`.
        """
        if snapshot.startswith(_SNAPSHOT):
            await self._runtime.making.limited(tenant, standby=True)

    # --- copying ------------------------------------------------------------------------------------

    async def take(self, tenant: TenantInstance) -> Replica:
        """Take the snapshot of a tenant with which its next copy is made. Raises `GatewayError`."""
        with translated(tenant.name):
            found = await self._incus.instance(tenant.name, state=lambda one: False)
        running = tenant.status == "running"
        copy = Replica(tenant.name, identity_of(found), tenant.location or "", time.time(), running)
        await self._operate(self._incus, "POST", _snapshots(copy.tenant), {"name": copy.snapshot})
        return copy

    async def send(self, copy: Replica, member: str) -> None:
        """Send the snapshot of `take` to a member's copy of a tenant; make the copy if there is none.

        It counts as the copy of before until `confirm`. Raises `GatewayError`.
        """
        name = copy.tenant
        await self._make_project()
        await self._drop_other(copy, member)
        with translated(name):
            found = await self._incus.instance(name, state=lambda one: False)
        # with `refresh` also the first time: Incus would want to move a running one's memory, too
        source = {"type": "copy", "source": name, "project": self._incus.project, "refresh": True}
        body = {"name": name, "type": "container", "source": source, **_bare(found)}
        await self._operate(self._copies, "POST", "/1.0/instances", body, target=member)

    async def confirm(self, copy: Replica) -> None:
        """Make what was sent the current copy, and delete what only the previous one needed.

        Raises `GatewayError`: then the copy is still that of before.
        """
        name = copy.tenant
        with translated(name):
            found = await self._incus.instance(name, state=lambda one: False)
        told = {"config": {_KEY: _told(copy), _INSTANCE: _kept(found)}}
        await self._operate(self._copies, "PATCH", instance_path(name), told)
        with contextlib.suppress(GatewayError):  # or after the next one
            await self._delete_snapshots(name, lambda snapshot: snapshot != copy.snapshot)

    async def give_up(self, copy: Replica) -> None:
        """Delete the snapshot of a copy that was not confirmed, if that can be done now."""
        with contextlib.suppress(GatewayError):
            await self._delete_snapshots(copy.tenant, lambda snapshot: snapshot == copy.snapshot)

    async def drop(self, tenant: str) -> None:
        """Delete the copy of a tenant, wherever it is; none is no error. Raises `Unavailable`."""
        with contextlib.suppress(NotFound):
            try:
                await self._operate(self._copies, "DELETE", instance_path(tenant))
            except GatewayError:  # snapshots of which only a part is left are in the way
                await self._disks_of_copies.tidy(tenant)
                await self._operate(self._copies, "DELETE", instance_path(tenant))

    async def tidy(self, tenant: str, keep: str = "") -> None:
        """Delete what earlier copies have left of their snapshots on a tenant, but for one. Logs failures."""
        await self._disks.tidy(tenant, keep, _SNAPSHOT)

    async def forget(self, tenant: str) -> None:
        """Remove what a tenant keeps for its copies. Raises `GatewayError`."""
        await self._delete_snapshots(tenant, lambda snapshot: True)
        await self.hold_back(tenant, held=False)

    async def hold_back(self, tenant: str, *, held: bool) -> None:
        """Set whether Incus starts a tenant with its server or leaves that to us. Raises `GatewayError`."""
        config = (await self._runtime.making.instance(tenant))["config"]
        if held == (_AUTOSTART in config):
            return
        if held:
            before = config.get("boot.autostart") or _UNSET
            change = {"boot.autostart": "false", _AUTOSTART: before}
        else:
            change = {"boot.autostart": _autostart(config), _AUTOSTART: ""}
        await self._operate(self._incus, "PATCH", instance_path(tenant), {"config": change})

    async def fallen(self) -> Sequence[str]:
        """Return the held back tenants that ran when their server went down."""
        return [
            str(one["name"])
            for one in await self._runtime.making.instances()
            if one["status"] == "Stopped"
            and one["config"].get("volatile.last_state.power") == "RUNNING"
            and one["config"].get(_AUTOSTART, "false") != "false"
        ]

    async def _drop_other(self, copy: Replica, member: str) -> None:
        """Delete a copy that cannot be refreshed: of an earlier tenant of the name, or on another member."""
        try:
            with translated(copy.tenant):
                there = await self._copies.get(instance_path(copy.tenant))
        except NotFound:
            return
        before = _copy_of(there)
        if before is None or before.instance != copy.instance or there.get("location") != member:
            await self.drop(copy.tenant)

    async def _delete_snapshots(self, name: str, which: Callable[[str], bool]) -> None:
        with translated(name):
            found = await self._incus.get(_snapshots(name))
        for path in found:
            snapshot = str(path).partition("?")[0].rpartition("/")[2]
            if snapshot.startswith(_SNAPSHOT) and which(snapshot):
                with contextlib.suppress(NotFound):
                    await self._operate(self._incus, "DELETE", instance_path(name, "snapshots", snapshot))

    async def _make_project(self) -> None:
        """Create the project of the copies, unless it exists."""
        project = self._copies.project
        with translated(""):
            try:
                await self._copies.get(f"/1.0/projects/{project}")
                return
            except IncusError as error:
                if error.status != 404:
                    raise
            config = {f"features.{name}": "false" for name in _FEATURES}
            about = "copies of tenants, for when their server is lost"
            body = {"name": project, "config": config, "description": about}
            try:
                await self._copies.operate(
                    "POST", "/1.0/projects", body, timeout=self._settings.incus_timeout
                )
            except IncusError as error:
                if "already exists" not in error.message:  # another gateway made it just now
                    raise

    # --- back to life -------------------------------------------------------------------------------

    async def revive(self, copy: Replica) -> None:
        """Make the tenant of a copy that this member has, with its name, id and disk, stopped. Idempotent.

        Raises `Conflict` if another instance has the name, and `Unavailable`. `drop` the copy afterwards.
        """
        name, own = copy.tenant, await self._runtime.making.instances()
        found = next((one for one in own if one["name"] == name), None)
        if found is not None and identity_of(found) != copy.instance:
            raise Conflict(f"another instance has the name {name} now")
        if found is not None and _KEY not in found["config"]:
            return  # an earlier process did
        try:
            if found is None:
                await self._made(copy)
            # what the copy has since may be half of a refresh that its server did not live to finish
            await self._disks.restore(name, copy.snapshot)
            await self._runtime.making.limited(name)
            await self._operate(self._incus, "PATCH", instance_path(name), {"config": {_KEY: ""}})
        except Conflict:
            raise
        except GatewayError:
            with contextlib.suppress(GatewayError):
                making = self._runtime.making
                await making.remove(lambda one: identity_of(one) == copy.instance, "it could not be revived")
            raise

    async def _made(self, copy: Replica) -> None:
        """Make the instance with the copy's disk and snapshots."""
        making, name = self._runtime.making, copy.tenant
        await making.free(name)
        with translated(name):
            there = await self._copies.get(instance_path(name))
        kept = orjson.loads(there["config"][_INSTANCE])
        # the first stays until the disk is the right one
        marks = {_KEY: _told(copy), _INSTANCE: "", "boot.autostart": kept["autostart"]}
        await making.make(
            name,
            {"type": "copy", "source": name, "project": self._copies.project},
            {**kept["config"], **marks},
            kept["devices"],
            start=False,
            identity=copy.instance,
            profiles=kept["profiles"],
        )

    async def _operate(
        self, incus: Incus, method: str, path: str, body: Mapping[str, Any] | None = None, target: str = ""
    ) -> None:
        name = "" if path.count("/") < 3 else path.split("/")[3]
        with translated(name):
            limit = COPY_TIMEOUT
            await incus.operate(method, path, body, timeout=limit, target=target or None)


def late_copies(state_dir: Path) -> Sequence[str]:
    """Return the tenants whose copies a gateway has last found late."""
    try:
        return (state_dir / _LATE_FILE).read_text().split()
    except OSError:
        return ()


def tell_late(state_dir: Path, late: Collection[str]) -> None:
    """Record the tenants whose copies are late, for `late_copies` in another process. Raises `OSError`."""
    file = state_dir / _LATE_FILE
    if late:
        file.write_text("".join(f"{name}\n" for name in late))
    else:
        file.unlink(missing_ok=True)


def _snapshots(name: str) -> str:
    return instance_path(name, "snapshots")


def _bare(found: Instance) -> dict[str, Any]:
    """Return configuration, devices and profiles of a copy, which has only a disk."""
    # keys that are not given are copied; an empty value prevents that
    unset = dict.fromkeys((key for key in found["config"] if _is_own(key)), "")
    disk = next(one for one in found["expanded_devices"].values() if one.get("path") == "/")
    return {
        "architecture": found["architecture"],
        "config": {**unset, "boot.autostart": "false"},
        "devices": {"root": disk},
        "profiles": [],
    }


def _kept(found: Instance) -> str:
    """Return what the copy has to remember of the tenant's instance. An address is one member's only."""
    config = found["config"]
    kept = {
        "config": {key: value for key, value in config.items() if _is_own(key) and key not in _PLACE},
        "autostart": _autostart(config),
        "devices": {
            name: {key: value for key, value in device.items() if key != "ipv4.address"}
            for name, device in found["devices"].items()
        },
        "profiles": found["profiles"],
    }
    return orjson.dumps(kept).decode()


def _autostart(config: Mapping[str, str]) -> str:
    """Return what an instance's `boot.autostart` is, or was before we held it back; empty for nothing."""
    return config.get(_AUTOSTART, config.get("boot.autostart", "")).removeprefix(_UNSET)


def _told(copy: Replica) -> str:
    return orjson.dumps([copy.instance, copy.home, copy.at, copy.running]).decode()


def _is_own(key: str) -> bool:
    """Return whether a key was set by the operator or the gateway, not by Incus itself."""
    return not key.startswith(("volatile.", "image."))


def _copy_of(instance: Instance) -> Replica | None:
    """Return what an instance is a copy of, None if it is none, or not complete yet."""
    try:
        identity, home, at, running = orjson.loads((instance.get("config") or {})[_KEY])
        return Replica(instance["name"], str(identity), str(home), float(at), bool(running))
    except (KeyError, ValueError, TypeError):
        return None
