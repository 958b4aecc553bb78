"""Tenants as Incus containers: find, create, change, start, stop and remove them.

Incus is the database: the set of tenants and their state, domain and port are read from it. An instance is a
tenant if `user.gateway.managed` is true in its expanded configuration, as set by the tenants' profile; the
gateway ignores all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from gateway.errors import Conflict, NotFound, Unavailable
from gateway.incus import Incus
from gateway.incus.client import instance_path
from gateway.rootfs.broker_client import DiskLimits
from gateway.rootfs.instance_record import MANAGED, identity_of, is_tenant
from gateway.runtime import Status, TenantInstance
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.disks import Disks, inherited
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.records import (
    ASLEEP,
    MIGRATION_STATE,
    PORT,
    domain_config,
    lacks_address,
    status_of,
    tenant_of,
)
from gateway.runtime.incus.resizing import Resizing
from gateway.settings import Settings


class IncusTenants:
    """Implements `gateway.runtime.TenantInstances` for one Incus project.

    `changed` is called with the name of each tenant that was changed in a way that matters to what is cached.
    """

    def __init__(
        self,
        settings: Settings,
        incus: Incus,
        making: Creation,
        disks: Disks,
        disk_limits: DiskLimits,
        resizing: Resizing,
        changed: Callable[[str], None],
    ) -> None:
        self._settings, self._incus, self._making = settings, incus, making
        self._disks, self._disk_limits, self._resizing = disks, disk_limits, resizing
        self._changed = changed

    async def list(self, *, addresses: bool = True) -> list[TenantInstance]:
        with translated(""):
            instances = await self._incus.instances(state=lacks_address if addresses else None)
        return [tenant_of(instance) for instance in instances if is_tenant(instance)]

    async def get(self, name: str) -> TenantInstance:
        with translated(name):
            instance = await self._incus.instance(name, state=lacks_address, as_listed=True)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        return tenant_of(instance)

    async def _status(self, name: str) -> Status:
        """Return a tenant's status as it is now: that of `get` may lag behind. Raises `NotFound`."""
        with translated(name):
            instance = await self._incus.instance(name, state=lambda one: False)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        return status_of(instance)

    async def instance(self, name: str) -> dict[str, Any]:
        """Return the tenant's instance with its state, as Incus has it. Raises `NotFound`."""
        with translated(name):
            instance = await self._incus.instance(name)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        return instance

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> TenantInstance:
        await self._making.free(name)
        source = {"type": "image", "alias": self._settings.image}
        config = {} if domain is None else domain_config(domain)
        async with self._making.undone("it could not be created") as identity:
            await self._making.make(name, source, config, {}, start=start, identity=identity)
            return await self._made(name, identity)

    async def start(self, name: str) -> None:
        status = await self._status(name)
        if status == "frozen":
            await self._state(name, "unfreeze")
        elif status != "running":
            await self._making.limited(name)
            await self._state(name, "start")
            await self._making.limited(name)

    async def stop(self, name: str) -> None:
        status = await self._status(name)
        if status == "stopped":
            return
        if status == "frozen":  # a frozen init cannot shut down
            await self._state(name, "stop", force=True)
            return
        await self._disk_limits.limit(name, ending=True)
        try:
            await self._state(name, "stop")
        except Unavailable:  # it does not shut down cleanly; or it has, and Incus could not tidy a full disk
            if await self._status(name) != "stopped":
                await self._state(name, "stop", force=True)

    async def restart(self, name: str) -> None:
        await self.stop(name)
        await self.start(name)

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        with translated(name):
            # an empty value removes the key in Incus
            await self._operate("PATCH", instance_path(name), {"config": {ASLEEP: "true" if asleep else ""}})

    async def destroy(self, name: str) -> None:
        instance = await self.instance(name)
        try:
            await self._making.destroy(name, identity_of(instance))
        finally:
            self._changed(name)

    async def rename(self, name: str, domain: str | None) -> None:
        await self.get(name)
        with translated(name):
            await self._operate("PATCH", instance_path(name), {"config": domain_config(domain)})

    async def resize(self, name: str, size: str) -> None:
        await self.get(name)
        try:
            await self._resizing.resize(name, size)
        finally:
            self._changed(name)

    async def clone(
        self, name: str, new: str, *, domain: str | None = None, snapshot: str | None = None
    ) -> TenantInstance:
        source = await self.instance(name)
        if MIGRATION_STATE in source["config"]:
            raise Conflict(f"tenant {name} is just moving in from a folder; clone it when that is finished")
        if snapshot is not None:
            await self._disks.fits(source, snapshot)
        await self._making.free(new)
        config = {MANAGED: "true", **domain_config(domain), PORT: source["expanded_config"].get(PORT, "")}
        config |= inherited(source, await self._making.limited(name))
        async with self._making.undone(f"the clone of {name} failed") as identity:
            copy = self._disks.copy_of(source, snapshot)
            await self._making.make(
                new,
                copy.source,
                copy.unset | config,
                copy.devices,
                start=False,
                identity=identity,
                profiles=copy.profiles,
            )
            await self._made(new, identity)
            await self._disks.blank(new)
            await self.start(new)
            return await self._made(new, identity)

    async def _made(self, name: str, identity: str) -> TenantInstance:
        """Return the tenant just created. Raises `Conflict` if the name belongs to another one by now."""
        with contextlib.suppress(NotFound):
            tenant = await self.get(name)
            if tenant.instance == identity:
                return tenant
        raise Conflict(f"tenant {name} was destroyed while it was being created")

    async def _state(self, name: str, action: str, *, force: bool = False) -> None:
        # a systemd that is just starting ignores the request to shut down
        seconds = -1 if force or action != "stop" else max(1, int(self._settings.stop_grace))
        body = {"action": action, "timeout": seconds, "force": force}
        with translated(name):
            await self._operate("PUT", instance_path(name, "state"), body)
        self._changed(name)

    async def _operate(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        await self._incus.operate(method, path, body, timeout=self._settings.lifecycle_timeout)
