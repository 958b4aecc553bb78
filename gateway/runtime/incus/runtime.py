"""Run tenants as Incus system containers: what belongs to one Incus project, in parts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from gateway.errors import NotFound, Unavailable
from gateway.holder.holder import HolderClient
from gateway.incus import Incus
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.broker_client import DiskLimits, instances
from gateway.runtime import Removed, unheard
from gateway.runtime.incus.clusters import serving
from gateway.runtime.incus.commands import IncusCommands
from gateway.runtime.incus.containers import Containers
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.disks import Disks
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.moves import Moves
from gateway.runtime.incus.resizing import Resizing
from gateway.runtime.incus.snapshots import IncusSnapshots
from gateway.runtime.incus.tenants import IncusTenants
from gateway.runtime.incus.usage import IncusUsage
from gateway.runtime.incus.watch import LifecycleWatch
from gateway.settings import Settings
from gateway.tasks import log_errors


class IncusRuntime:
    """The `TenantRuntime` of one Incus project. An async context manager.

    Only where containers are is cached, in `containers`, as long as the event stream, which would report a
    change, is connected.
    """

    def __init__(
        self,
        settings: Settings,
        removed: Removed = unheard,
        incus: Incus | None = None,
        holder: HolderClient | None = None,
    ) -> None:
        self._settings = settings
        self.incus = incus or Incus(settings.incus_socket, settings.incus_project, settings.incus_timeout)
        tenants = instances(settings)
        self.locations: Mapping[str, Any] = tenants.to_dict()
        self._disk_limits = DiskLimits(settings.broker_socket, tenants)
        self.making = Creation(settings, self.incus, removed, self._disk_limits.limit)
        self.moves = Moves(settings, self.incus, self.making)
        self.containers = Containers(settings, self.incus, lambda: self.changes.standing)
        self.commands = IncusCommands(settings, self.incus, self.containers.init_pid, holder)
        self.resizing = Resizing(settings, self.incus, self.making, self.commands)
        disks = Disks(settings, self.incus)
        self.tenants = IncusTenants(
            *(settings, self.incus, self.making, disks, self._disk_limits),
            resizing=self.resizing,
            changed=self._changed,
        )
        self.snapshots = IncusSnapshots(self.tenants, disks, self._disk_limits, self.making, self._changed)
        self.usage = IncusUsage(settings, self.incus, self.tenants, self.making, self.containers)
        self.changes = LifecycleWatch(
            settings, self.incus, self.tenants, self._changed, self.containers.leaving
        )

    async def __aenter__(self) -> IncusRuntime:
        await self.incus.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.commands.aclose()
        await self._disk_limits.aclose()
        await self.incus.__aexit__(kind, error, trace)

    async def filesystem(self, name: str) -> FilesystemRoot:
        return await self.containers.filesystem(name)

    async def ready(self) -> None:
        await serving(self.incus, self._settings)
        if not self.changes.standing:
            raise Unavailable("the Incus event stream is not connected yet")

    async def prepare(self, tenants: Sequence[str]) -> None:
        with translated(""):
            await self.changes.prepare()
            await self.incus.instances()  # kept from now on, since the events tell of changes
        for tenant in tenants:
            with contextlib.suppress(NotFound), self.commands.expect(tenant):  # its shells wait a while
                await self.containers.init_pid(tenant)
        await self.commands.expected()

    async def leave(self) -> None:
        await self.commands.leave()

    async def sweep(self) -> int:
        ended = 0
        for tenant in await self.tenants.list(addresses=False):
            if tenant.status == "running":
                with log_errors(f"the search for processes that an earlier gateway left in {tenant.name}"):
                    with contextlib.suppress(NotFound):
                        ended += await self.commands.sweep(tenant.name)
        return ended

    def _changed(self, name: str | None) -> None:
        """Drop what is kept of a tenant that may have changed, or of all."""
        self.containers.forget(name)
        self.commands.drop(name)
