"""Bring a tenant's instance to another member: by a copy, which is refreshed until it becomes the tenant.

```
old home    SHOP ── snapshots, one a round ──────────── stop ── Moved-ID (no tenant any more) ── deleted
new home    Moving-ID (no tenant yet) ◄─ refreshed ─ refreshed ──────────────────► SHOP
```

Incus's own `move` sends the whole disk while the tenant is stopped. A refresh sends what changed since the
last snapshot that both have. Names are unique in the cluster; those of the two others are no tenant's, since
they begin with a capital letter.

Facts about incusd that shape this module (measured on 6.0.4): a running instance can be copied to another
member only by a refresh; a refresh also brings and removes snapshots; to rename takes a tenth of a second.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Final

from gateway.errors import Conflict, NotFound
from gateway.incus import Incus, IncusError
from gateway.incus.client import instance_path
from gateway.rootfs.instance_record import IDENTITY, MANAGED, identity_of
from gateway.runtime.incus.creation import MADE, STATIC, Creation
from gateway.runtime.incus.disks import OURS
from gateway.runtime.incus.errors import translated
from gateway.settings import Settings

log = logging.getLogger(__name__)

MOVING: Final = "Moving-"
MOVED: Final = "Moved-"
COPY_TIMEOUT: Final = 3600.0  # seconds, since the first copy transfers the whole disk
_SNAPSHOT: Final = f"{OURS}move-"
_MARK: Final = "user.gateway.moving"  # on both instances: the move's id
_NIC: Final = "eth0"
_KEPT: Final = ("volatile.base_image", "volatile.last_state.idmap", IDENTITY)


def is_aside(name: str) -> bool:
    """Return whether an instance of this name is one that a move has made or put aside."""
    return name.startswith((MOVING, MOVED))


class Moves:
    """The steps of a move at Incus, on this member: those of the old home and those of the new one.

    Each can be repeated. Each raises what `translated` does.
    """

    def __init__(self, settings: Settings, incus: Incus, making: Creation) -> None:
        self._settings, self._incus, self._making = settings, incus, making

    # --- at the old home ----------------------------------------------------------------------------

    async def snapshot(self, tenant: str, number: int) -> None:
        """Take the snapshot of one round."""
        name = f"{_SNAPSHOT}{number}"
        with translated(tenant):
            await self._operate("POST", instance_path(tenant, "snapshots"), {"name": name, "stateful": False})

    async def forget_snapshots(self, tenant: str, but: int | None = None) -> None:
        """Remove the snapshots of all rounds, or of all but one."""
        kept = None if but is None else f"{_SNAPSHOT}{but}"
        with translated(tenant):
            found = await self._incus.get(instance_path(tenant, "snapshots"))
            names = [str(url).partition("?")[0].rpartition("/")[2] for url in found]
            for name in names:
                if name.startswith(_SNAPSHOT) and name != kept:
                    await self._operate("DELETE", instance_path(tenant, "snapshots", name))

    async def put_aside(self, tenant: str, instance: str, move: str) -> None:
        """Free the name of the stopped tenant, which is no tenant from now on."""
        with contextlib.suppress(NotFound):
            await self._making.instance(MOVED + move)
            return  # the name is free already, or the new home's
        found = await self._making.instance(tenant)
        if identity_of(found) != instance:
            raise Conflict(f"{tenant} is a different instance now")
        with translated(tenant):
            await self._operate("PATCH", instance_path(tenant), {"config": {MANAGED: "false", _MARK: move}})
            await self._operate("POST", instance_path(tenant), {"name": MOVED + move})

    async def bring_back(self, tenant: str, instance: str, move: str, managed: str | None) -> None:
        """Undo `put_aside`, where there is no new home any more."""
        await self._become(MOVED + move, tenant, instance, move, managed)

    async def discard_old(self, move: str) -> None:
        """Delete the instance that was put aside. Idempotent."""
        await self._discard(MOVED + move)

    # --- at the new home ----------------------------------------------------------------------------

    async def copy(self, tenant: str, instance: str, move: str, *, last: bool = False) -> None:
        """Make the copy of another member's tenant, or refresh it; `last`: with all its settings, too."""
        name, patience = MOVING + move, COPY_TIMEOUT
        with translated(tenant):
            found = await self._incus.get(instance_path(tenant))
        if identity_of(found) != instance:
            raise Conflict(f"{tenant} is a different instance now")
        source = {"type": "copy", "source": tenant, "refresh": True}
        config = {key: value for key, value in found["config"].items() if _travels(key)}
        config |= {MANAGED: "false", _MARK: move}
        try:
            copy = await self._making.instance(name)
        except NotFound:
            await self._making.make(
                *(name, source, config, found["devices"]),
                start=False,
                identity=instance,
                profiles=found["profiles"],
                architecture=found["architecture"],
                patience=patience,
            )
            return
        if last:
            copy = await self._settle(copy, found, config)
        body = {key: copy[key] for key in ("name", "type", "profiles", "config", "devices", "architecture")}
        with translated(tenant):
            await self._operate("POST", "/1.0/instances", {**body, "source": source}, patience)
        # each time, since the next refresh removes the snapshot that this one's bytes count for
        await self._making.limited(name)

    async def _settle(
        self, copy: Mapping[str, Any], found: Mapping[str, Any], config: Mapping[str, str]
    ) -> Mapping[str, Any]:
        """Give the copy the settings that the tenant has got since, but for its address; return the copy."""
        own = {key: value for key, value in copy["config"].items() if not _travels(key) or key == STATIC}
        devices = {**found["devices"], _NIC: copy["devices"][_NIC]}
        changed = {**copy, "config": {**config, **own}, "devices": devices, "profiles": found["profiles"]}
        changed["config"] |= {MANAGED: "false", _MARK: str(config[_MARK])}
        if changed == copy:
            return copy
        with translated(str(copy["name"])):
            await self._operate("PUT", instance_path(str(copy["name"])), changed)
        return changed

    async def take_over(self, tenant: str, instance: str, move: str, managed: str | None) -> None:
        """Make the copy the tenant, whose name is free. `managed` is the old instance's own mark, if any."""
        await self._become(MOVING + move, tenant, instance, move, managed)

    async def _become(self, name: str, tenant: str, instance: str, move: str, managed: str | None) -> None:
        try:
            await self._making.instance(name)
        except NotFound:  # an earlier attempt has renamed it
            found = await self._making.instance(tenant)
            if identity_of(found) != instance or found["config"].get(_MARK) not in (move, None):
                raise Conflict(f"{tenant} is a different instance now") from None
        else:
            with translated(tenant):
                await self._operate("POST", instance_path(name), {"name": tenant})
        with translated(tenant):
            # an empty value removes the key in Incus
            config = {MANAGED: managed or "", _MARK: ""}
            await self._operate("PATCH", instance_path(tenant), {"config": config})

    async def managed(self, tenant: str) -> str | None:
        """Return the instance's own mark as a tenant, None where that is its profile's."""
        found = (await self._making.instance(tenant))["config"].get(MANAGED)
        return None if found is None else str(found)

    async def discard_copy(self, move: str) -> None:
        """Delete the copy of a move that is given up. Idempotent."""
        await self._discard(MOVING + move)

    async def _discard(self, name: str) -> None:
        """Delete one of a move's own instances."""
        try:
            found = await self._making.instance(name)
        except NotFound:
            return
        if found["config"].get(MANAGED) != "false":
            raise Conflict(f"{name} does not belong to a move")
        with translated(name):
            if found["status"] != "Stopped":
                await self._operate(
                    "PUT", instance_path(name, "state"), {"action": "stop", "timeout": -1, "force": True}
                )
            await self._operate("DELETE", instance_path(name))

    async def _operate(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        patience: float | None = None,
    ) -> None:
        try:
            limit = patience or self._settings.lifecycle_timeout
            await self._incus.operate(method, path, body, timeout=limit)
        except IncusError as error:
            if "already exists" not in error.message:
                raise
            log.info("%s %s was already done", method, path)


def _travels(key: str) -> bool:
    """Return whether a key of an instance's configuration is the same on its new home."""
    return key in _KEPT or (not key.startswith("volatile.") and key not in (MADE, STATIC))
