"""Run tenants as Incus system containers: what belongs to one Incus project, in parts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final
from urllib.parse import quote

from gateway.errors import NotFound, Unavailable
from gateway.holder.holder import HolderClient
from gateway.incus import Incus, IncusError, member_of
from gateway.incus.members import NO_QUORUM
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.broker_client import DiskLimits, instances
from gateway.rootfs.instance_record import is_tenant
from gateway.runtime import DiskSnapshot, Removed, Space, TenantInstance, unheard
from gateway.runtime.incus.commands import IncusCommands
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.disks import Disks
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.moves import Moves
from gateway.runtime.incus.records import disk_state, metrics_of
from gateway.runtime.incus.resizing import Resizing
from gateway.runtime.incus.tenants import IncusTenants
from gateway.runtime.incus.watch import LifecycleWatch
from gateway.runtime.listening import TenantPort, visited
from gateway.settings import Settings
from gateway.tasks import log_errors

REASON: Final = "clustered"
_DATABASE: Final = 1.0  # seconds for a read of a cluster's database


async def serving(incus: Incus, settings: Settings) -> None:
    """Raise `Unavailable` if incusd does not answer, cannot decide, or is in another cluster than before."""
    with translated(""):
        server = await incus.get("/1.0")
        before = await incus.member()
    if (now := member_of(server)) != before:
        where = f"the member {now} of a cluster" if now else "not in a cluster"
        raise Unavailable(f"incusd is {where} now; restart the gateway", reason=REASON)
    if now:
        await _decides(incus, settings.image)


async def _decides(incus: Incus, image: str) -> None:
    """Raise `Unavailable` if a cluster's database does not answer; `/1.0` is answered without it."""
    try:
        async with asyncio.timeout(_DATABASE):
            await incus.get(f"/1.0/images/aliases/{quote(image, safe='')}")
    except (TimeoutError, IncusError) as error:
        if isinstance(error, IncusError) and error.status == 404:
            return
        raise Unavailable(
            "the cluster's database does not answer: most members are away, or its leader has just died; "
            "running sites and commands keep running",
            reason=NO_QUORUM,
        ) from error


class IncusSnapshots:
    """Implements `gateway.runtime.DiskSnapshots`. `changed` is called with the name of a restored tenant."""

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

    async def list(self, tenant: str) -> Sequence[DiskSnapshot]:
        await self._tenants.get(tenant)
        return await self._disks.snapshots(tenant)

    async def create(self, tenant: str, name: str) -> DiskSnapshot:
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


@dataclass(frozen=True, slots=True)
class _Container:
    root: FilesystemRoot
    init_pid: int


class Containers:
    """The containers of one Incus project's tenants.

    What is found is kept while `standing` returns true, that is, as long as the event stream would report a
    change; `forget` then drops it.
    """

    def __init__(self, settings: Settings, incus: Incus, standing: Callable[[], bool]) -> None:
        self._settings, self._incus, self._standing = settings, incus, standing
        self._found: dict[str, _Container] = {}
        self.leaving: set[str] = set()
        """Tenants on their way to another member: nothing of them is touched, and their end is no event."""

    async def filesystem(self, name: str) -> FilesystemRoot:
        """Return where the tenant's files are, also for a stopped tenant."""
        return (await self._find(name)).root

    async def init_pid(self, name: str) -> int:
        """Return the current host pid of the container's init process, 0 if it is not running."""
        return (await self._find(name)).init_pid

    def forget(self, name: str | None) -> None:
        """Drop what is kept of a tenant that may have changed, or of all."""
        if name is None:
            self._found.clear()
        else:
            self._found.pop(name, None)

    async def _find(self, name: str) -> _Container:
        if name in self.leaving:
            raise Unavailable(f"tenant {name} is moving to another server; try again", reason="moving")
        if (found := self._found.get(name)) is not None:
            return found
        standing = self._standing()  # or a change during the lookup could be missed
        with translated(name):
            instance, init_pid = await self._incus.started(name)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        found = _Container(FilesystemRoot(name, self._settings.workspace, disk_state(instance)), init_pid)
        if standing and self._standing():
            self._found[name] = found
        return found


log = logging.getLogger(__name__)


class IncusUsage:
    """Implements `gateway.runtime.UsageReader`."""

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

    async def visited(self, tenants: Sequence[TenantInstance]) -> Mapping[str, float]:
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
