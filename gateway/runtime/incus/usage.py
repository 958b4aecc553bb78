"""What Incus containers use: memory, processes, disk, network, connections of visitors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.errors import NotFound
from gateway.incus import Incus, IncusError
from gateway.runtime import Space, Tenant
from gateway.runtime.incus.containers import Containers
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.records import metrics_of
from gateway.runtime.incus.tenants import IncusTenants
from gateway.runtime.visits import TenantPort, visited
from gateway.settings import Settings

log = logging.getLogger(__name__)


class IncusUsage:
    """Implements `gateway.runtime.Usage`."""

    def __init__(
        self,
        settings: Settings,
        incus: Incus,
        tenants: IncusTenants,
        making: Creation,
        containers: Containers,
    ) -> None:
        self._settings, self._incus, self._tenants = settings, incus, tenants
        self._making, self._containers = making, containers

    async def metrics(self, name: str) -> Mapping[str, Any]:
        instance = await self._tenants.instance(name)
        return metrics_of(instance, await self._making.limited(name))

    async def visited(self, tenants: Sequence[Tenant]) -> Mapping[str, float]:
        places = {}
        for tenant in tenants:
            if tenant.port is not None:
                with contextlib.suppress(NotFound):
                    pid = await self._containers.init_pid(tenant.name)
                    places[tenant.name] = TenantPort(tenant.port, tenant.address, pid or None)
        return await asyncio.to_thread(visited, places)

    async def held(self, name: str) -> int | None:
        return await self._making.limited(name)

    async def unshared(self, name: str) -> int | None:
        disk = ((await self._tenants.instance(name))["state"].get("disk") or {}).get("root") or {}
        usage: int | None = disk.get("usage")
        return usage

    async def space(self) -> Space | None:
        try:
            found = await self._incus.get(f"/1.0/storage-pools/{self._settings.pool}/resources")
        except IncusError as error:
            log.warning("cannot find out how full the storage pool is: %s", error)
            return None
        return Space(int(found["space"]["total"]), int(found["space"]["used"]))
