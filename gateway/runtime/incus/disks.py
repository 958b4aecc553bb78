"""Snapshot, restore and clone the disks of Incus containers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import Conflict, GatewayError, NotFound, TooLarge
from gateway.incus import Incus
from gateway.incus.client import instance_path
from gateway.runtime import DiskSnapshot
from gateway.runtime.incus.creation import STATIC
from gateway.runtime.incus.errors import translated
from gateway.runtime.sizes import size_of
from gateway.settings import Settings

log = logging.getLogger(__name__)

OURS: Final = "_gateway-"
"""What the names of the gateway's own snapshots begin with, as no user's does: neither shown nor counted."""

_IDMAP: Final = ("volatile.idmap.base", "volatile.idmap.next")
"""An instance's host uids, which no other one of its server has."""

INHERITED: Final = "user.gateway.inherited"
"""On a clone: the bytes that it shared with other tenants when it was made, in a pool with simple quotas."""

# identifies a machine: two with the same id would get the same address
_MACHINE_ID: Final = "/etc/machine-id"


@dataclass(frozen=True, slots=True)
class Copy:
    """The configuration of an instance with a copy of another's disk. Keys in `unset` are not copied."""

    source: Mapping[str, Any]
    unset: dict[str, str]
    devices: Mapping[str, Mapping[str, str]]
    profiles: Sequence[str]


def inherited(source: Mapping[str, Any], counted: int | None) -> dict[str, str]:
    """Return the key of a clone that tells what it shares with its source, for which `counted` bytes count.

    They count for the source only, even when that is gone, see `rootfs.disk_groups`; where Incus counts, with
    None, there is no such key. Raises `TooLarge` if clones of clones would share ever more.
    """
    if counted is None:
        return {}
    size = size_of(source["expanded_devices"].get("root", {}).get("size", ""))
    before = source["config"].get(INHERITED, "")
    shared = counted + (int(before) if before.isdecimal() else 0)
    if size and shared > size:
        raise TooLarge(
            f"tenant {source['name']} is a clone itself: another one would share {shared} bytes with both, "
            f"and its disk has {size}; deploy the site again instead",
            reason="quota",
            limit=size,
            held=shared,
        )
    return {INHERITED: str(shared)}


class Disks:
    """The disks of one Incus project's instances. Does not check whether an instance is a tenant."""

    def __init__(self, settings: Settings, incus: Incus) -> None:
        self._timeout = settings.lifecycle_timeout
        self._incus = incus

    async def snapshots(self, name: str) -> Sequence[DiskSnapshot]:
        with translated(name):
            found = await self._incus.get(instance_path(name, "snapshots"), recursion="1")
        kept = [one for one in map(_snapshot, found) if not one.name.startswith(OURS)]
        return sorted(kept, key=lambda snapshot: snapshot.created or "")

    async def snapshot(self, name: str, snapshot: str) -> DiskSnapshot:
        if any(kept.name == snapshot for kept in await self.snapshots(name)):
            raise Conflict(f"tenant {name} already has a snapshot {snapshot}; choose another name")
        body = {"name": snapshot, "stateful": False}
        with translated(name):
            await self._operate("POST", instance_path(name, "snapshots"), body)
            return _snapshot(await self._incus.get(instance_path(name, "snapshots", snapshot)))

    async def restore(self, name: str, snapshot: str) -> None:
        """Restore only the disk of a stopped instance."""
        with translated(name):
            before = await self._incus.get(instance_path(name))
            await self._operate("PUT", instance_path(name), {"restore": snapshot})
            # Incus restores old settings too, but e.g. an old domain may belong to another tenant by now
            after = await self._incus.get(instance_path(name))
            config = {
                **_own(before),
                **{key: value for key, value in after["config"].items() if not _kept(key)},
                # a snapshot has those that it was taken with, maybe on another server
                **{key: before["config"][key] for key in _IDMAP if key in before["config"]},
            }
            body = {**after, "config": config, "devices": before["devices"], "profiles": before["profiles"]}
            await self._operate("PUT", instance_path(name), body)

    async def delete(self, name: str, snapshot: str) -> None:
        await self.known(name, snapshot)
        with translated(name):
            await self._operate("DELETE", instance_path(name, "snapshots", snapshot))

    async def tidy(self, name: str, keep: str = "", beginning: str = OURS) -> None:
        """Delete the gateway's own snapshots of an instance, but for one, each for itself. Logs failures.

        A power cut may leave a snapshot's record without its volume or subvolume. With it Incus starts,
        changes and copies the instance no more, but it still deletes the snapshot (measured with 6.0.4).
        """
        with translated(name):
            found = await self._incus.get(instance_path(name, "snapshots"))
        for path in found:
            snapshot = str(path).partition("?")[0].rpartition("/")[2]
            if snapshot.startswith(beginning) and snapshot != keep:
                try:
                    with translated(name):
                        await self._operate("DELETE", instance_path(name, "snapshots", snapshot))
                except NotFound:
                    continue
                except GatewayError as error:
                    log.warning("cannot delete the snapshot %s of %s yet: %s", snapshot, name, error.message)

    @staticmethod
    def copy_of(found: Mapping[str, Any], snapshot: str | None) -> Copy:
        """Return the configuration of a copy of an instance's disk, with the instance's limits."""
        name = found["name"]
        # keys that are not given are copied; an empty value prevents that
        unset = {key: "" for key in found["config"] if key.startswith("user.") or key == STATIC}
        devices = {
            device: {key: value for key, value in facts.items() if key != "ipv4.address"}
            for device, facts in found["devices"].items()
            if facts.get("type") != "proxy"
        }
        source = {
            "type": "copy",
            "source": name if snapshot is None else f"{name}/{snapshot}",
            "instance_only": True,
        }
        return Copy(source, unset, devices, found["profiles"])

    async def blank(self, name: str) -> None:
        """Clear the machine id of a copy that has not been started yet."""
        with translated(name):
            await self._incus.put_file(name, _MACHINE_ID, b"", mode=0o444)

    async def fits(self, instance: Mapping[str, Any], snapshot: str) -> None:
        """Raise `NotFound` if there is no such snapshot, `Conflict` if its disk was larger than now.

        A disk that holds more than its quota would become unusable.
        """
        name = instance["name"]
        await self.known(name, snapshot)
        with translated(name):
            kept = await self._incus.get(instance_path(name, "snapshots", snapshot))
        then, now = (one["expanded_devices"].get("root", {}).get("size", "") for one in (kept, instance))
        if size_of(now) and size_of(then) > size_of(now):
            raise Conflict(
                f"snapshot {snapshot} is of a disk of {then}, but the tenant's disk has {now} now; "
                "give the tenant its former size first (PATCH size, incus-gateway resize)",
                reason="in_use",
            )

    async def known(self, name: str, snapshot: str) -> None:
        """Raise `NotFound` if there is no such snapshot."""
        if not any(kept.name == snapshot for kept in await self.snapshots(name)):
            raise NotFound(f"tenant {name} has no snapshot {snapshot[:63]}")

    async def _operate(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        await self._incus.operate(method, path, body, timeout=self._timeout)


def _snapshot(found: Mapping[str, Any]) -> DiskSnapshot:
    size = found.get("size", -1)  # unknown in a pool without quotas
    return DiskSnapshot(found["name"].rpartition("/")[2], found["created_at"], None if size < 0 else size)


def _kept(key: str) -> bool:
    """Return whether a key was set by the operator or the gateway, not by Incus itself."""
    return not key.startswith(("volatile.", "image."))


def _own(instance: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in instance["config"].items() if _kept(key)}
