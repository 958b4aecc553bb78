"""Snapshot, restore and clone the disks of Incus containers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import Conflict, NotFound
from gateway.incus import Incus
from gateway.incus.client import instance_path
from gateway.runtime import Snapshot
from gateway.runtime.incus.creation import STATIC
from gateway.runtime.incus.errors import translated
from gateway.runtime.sizes import size_of
from gateway.settings import Settings

# by it a machine tells itself from another: two of one id would be given one address
_MACHINE_ID: Final = "/etc/machine-id"


@dataclass(frozen=True, slots=True)
class Copy:
    """The configuration for an instance with a copy of another's disk. Keys in `unset` are not copied."""

    source: Mapping[str, Any]
    unset: dict[str, str]
    devices: Mapping[str, Mapping[str, str]]
    profiles: Sequence[str]


class Disks:
    """The disks of one Incus project's instances. Nothing here looks whether an instance is a tenant."""

    def __init__(self, settings: Settings, incus: Incus) -> None:
        self._timeout = settings.lifecycle_timeout
        self._incus = incus

    async def snapshots(self, name: str) -> Sequence[Snapshot]:
        with translated(name):
            found = await self._incus.get(instance_path(name, "snapshots"), recursion="1")
        return sorted(map(_snapshot, found), key=lambda snapshot: snapshot.created or "")

    async def snapshot(self, name: str, snapshot: str) -> Snapshot:
        if any(kept.name == snapshot for kept in await self.snapshots(name)):
            raise Conflict(f"tenant {name} has a snapshot {snapshot}; choose another name")
        body = {"name": snapshot, "stateful": False}
        with translated(name):
            await self._operate("POST", instance_path(name, "snapshots"), body)
            return _snapshot(await self._incus.get(instance_path(name, "snapshots", snapshot)))

    async def restore(self, name: str, snapshot: str) -> None:
        """Bring back the disk of a stopped instance, and nothing but the disk."""
        with translated(name):
            before = await self._incus.get(instance_path(name))
            await self._operate("PUT", instance_path(name), {"restore": snapshot})
            # Incus brings back the settings of then too: an old domain might be another tenant's by now
            after = await self._incus.get(instance_path(name))
            config = {
                **_own(before),
                **{key: value for key, value in after["config"].items() if not _kept(key)},
            }
            body = {**after, "config": config, "devices": before["devices"], "profiles": before["profiles"]}
            await self._operate("PUT", instance_path(name), body)

    async def delete(self, name: str, snapshot: str) -> None:
        await self.known(name, snapshot)
        with translated(name):
            await self._operate("DELETE", instance_path(name, "snapshots", snapshot))

    @staticmethod
    def copy_of(found: Mapping[str, Any], snapshot: str | None) -> Copy:
        """Return what a copy of that instance's disk is made of, with the instance's limits."""
        name = found["name"]
        # a key that is not given is copied; an empty value prevents that
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
        """Take the machine's name for itself away from a copy that has not run yet."""
        with translated(name):
            await self._incus.put_file(name, _MACHINE_ID, b"", mode=0o444)

    async def fits(self, instance: Mapping[str, Any], snapshot: str) -> None:
        """Return if there is that snapshot, and the instance's disk has room for all that it may hold.

        Raises `NotFound` and `Conflict`. A disk with more on it than its quota cannot be used any more.
        """
        name = instance["name"]
        await self.known(name, snapshot)
        with translated(name):
            kept = await self._incus.get(instance_path(name, "snapshots", snapshot))
        then, now = (one["expanded_devices"].get("root", {}).get("size", "") for one in (kept, instance))
        if size_of(now) and size_of(then) > size_of(now):
            raise Conflict(
                f"snapshot {snapshot} is of a disk of {then}, and the tenant has one of {now} now; "
                "give the tenant that size again first (PATCH size, incus-gateway resize)",
                reason="in_use",
            )

    async def known(self, name: str, snapshot: str) -> None:
        """Return if there is that snapshot. Raises `NotFound`."""
        if not any(kept.name == snapshot for kept in await self.snapshots(name)):
            raise NotFound(f"tenant {name} has no snapshot {snapshot[:63]}")

    async def _operate(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        await self._incus.operate(method, path, body, timeout=self._timeout)


def _snapshot(found: Mapping[str, Any]) -> Snapshot:
    size = found.get("size", -1)  # a pool without quotas tells none
    return Snapshot(found["name"].rpartition("/")[2], found["created_at"], None if size < 0 else size)


def _kept(key: str) -> bool:
    """Say whether a setting is the operator's or ours, not Incus's own notes of the instance."""
    return not key.startswith(("volatile.", "image."))


def _own(instance: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in instance["config"].items() if _kept(key)}
