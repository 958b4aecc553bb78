"""Snapshots of the local runtime's tenants: copies of their folders."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence

from gateway.runtime import Snapshot
from gateway.runtime.local.changes import LocalChanges
from gateway.runtime.local.disks import LocalDisks
from gateway.runtime.local.tenants import LocalTenants


class LocalSnapshots:
    """Implements `gateway.runtime.Snapshots`."""

    def __init__(self, tenants: LocalTenants, disks: LocalDisks, changes: LocalChanges) -> None:
        self._tenants, self._disks, self._changes = tenants, disks, changes

    async def list(self, tenant: str) -> Sequence[Snapshot]:
        return await self._disks.snapshots(tenant)

    async def create(self, tenant: str, name: str) -> Snapshot:
        made = await self._disks.keep(tenant, name)
        self._changes.add("tenant.snapshot.created", tenant, snapshot=name)
        return made

    async def restore(self, tenant: str, name: str) -> None:
        ran = self._disks.get(tenant).status == "running"
        self._disks.kept(tenant, name)  # raises if it does not exist
        await self._tenants.stop(tenant)
        await self._disks.restore(tenant, name)
        self._changes.add("incus.instance-restored", tenant)
        self._changes.add("tenant.snapshot.restored", tenant, snapshot=name)
        if ran:
            await self._tenants.start(tenant)

    async def delete(self, tenant: str, name: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._disks.kept(tenant, name))
        self._changes.add("tenant.snapshot.deleted", tenant, snapshot=name)
