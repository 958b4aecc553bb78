"""Snapshots of tenants' disks in Incus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.rootfs.broker_client import DiskLimits
from gateway.runtime import Snapshot
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.disks import Disks
from gateway.runtime.incus.tenants import IncusTenants


class IncusSnapshots:
    """Implements `gateway.runtime.Snapshots`. `changed` is called with the name of a restored tenant."""

    def __init__(
        self,
        tenants: IncusTenants,
        disks: Disks,
        disk_limits: DiskLimits,
        making: Creation,
        changed: Callable[[str], None],
    ) -> None:
        self._tenants, self._disks, self._disk_limits = tenants, disks, disk_limits
        self._making, self._changed = making, changed

    async def list(self, tenant: str) -> Sequence[Snapshot]:
        await self._tenants.get(tenant)
        return await self._disks.snapshots(tenant)

    async def create(self, tenant: str, name: str) -> Snapshot:
        await self._tenants.get(tenant)
        return await self._disks.snapshot(tenant, name)

    async def restore(self, tenant: str, name: str) -> None:
        ran = (await self._tenants.get(tenant)).status != "stopped"
        await self._disks.fits(await self._tenants.instance(tenant), name)  # check before stopping it
        await self._tenants.stop(tenant)
        try:
            await self._making.limited(tenant)
            await self._disks.restore(tenant, name)
            await self._disk_limits.free()  # or what it held keeps a full one from starting
            await self._making.limited(tenant)  # in any case: its files can be written while it is stopped
        finally:
            self._changed(tenant)
            if ran:
                await self._tenants.start(tenant)

    async def delete(self, tenant: str, name: str) -> None:
        await self._tenants.get(tenant)
        await self._disk_limits.limit(tenant, ending=True)  # Incus needs some room for it on a full disk
        await self._disks.delete(tenant, name)
        await self._disk_limits.free()
        await self._making.limited(tenant)
