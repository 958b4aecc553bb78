"""The local runtime, in parts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gateway.errors import InvalidParams, NotFound
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.locations import Folders
from gateway.runtime import DiskSnapshot, Removed, Space, TenantInstance, unheard
from gateway.runtime.listening import TenantPort, visited
from gateway.runtime.local.commands import LocalCommands
from gateway.runtime.local.disks import LocalChanges, LocalDisks, size
from gateway.settings import Settings


class LocalUsage:
    """Implements `gateway.runtime.UsageReader`."""

    def __init__(self, disks: LocalDisks, commands: LocalCommands) -> None:
        self._disks, self._commands = disks, commands

    async def metrics(self, name: str) -> Mapping[str, Any]:
        self._disks.get(name)
        return {"processes": self._commands.running(name)}

    async def visited(self, tenants: Sequence[TenantInstance]) -> Mapping[str, float]:
        places = {t.name: TenantPort(t.port, "127.0.0.1") for t in tenants if t.port is not None}
        return await asyncio.to_thread(visited, places)

    async def held(self, name: str) -> int | None:
        return None

    async def unshared(self, name: str) -> int | None:
        return await asyncio.to_thread(size, self._disks.disk(name))

    async def space(self) -> Space | None:
        found = shutil.disk_usage(self._disks.home)
        return Space(found.total, found.used)


class LocalTenants:
    """Implements `gateway.runtime.TenantInstances`. A tenant runs if its record says so."""

    def __init__(
        self, settings: Settings, disks: LocalDisks, commands: LocalCommands, changes: LocalChanges
    ) -> None:
        self._settings, self._disks = settings, disks
        self._commands, self._changes = commands, changes

    async def list(self, *, addresses: bool = True) -> list[TenantInstance]:
        return self._disks.list()

    async def get(self, name: str) -> TenantInstance:
        return self._disks.get(name)

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> TenantInstance:
        await self.make(name, domain)
        if start:
            await self.start(name)
        return self._disks.get(name)

    async def make(
        self,
        name: str,
        domain: str | None,
        *,
        disk: Path | None = None,
        site: Mapping[str, Any] | None = None,
    ) -> None:
        """Create a stopped tenant; see `LocalDisks.make`."""
        await self._disks.make(name, domain, self._settings.workspace, disk=disk, site=site)
        self._changes.add("tenant.created", name)

    def set_site(self, name: str, **facts: Any) -> None:
        """Record the `domain` of a tenant's site, or the loopback `port` at which it answers."""
        self._disks.change(name, **facts)

    async def start(self, name: str) -> None:
        if self._disks.get(name).status != "running":
            self._disks.change(name, status="running")
            self._changes.add("tenant.started", name)

    async def stop(self, name: str) -> None:
        if self._disks.get(name).status != "stopped":
            self._disks.change(name, status="stopped")
            await self._commands.end_all(name)
            self._changes.add("tenant.stopped", name)

    async def restart(self, name: str) -> None:
        await self.stop(name)
        await self.start(name)

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        self._disks.change(name, asleep=asleep)
        self._changes.add("incus.instance-updated", name)

    async def destroy(self, name: str) -> None:
        if not await self.remove(name, self._disks.get(name).instance):
            raise NotFound(f"no tenant {name}")

    async def remove(self, name: str, instance: str | None) -> bool:
        """Destroy the tenant with this name if it is this instance; return whether it was."""
        with contextlib.suppress(NotFound):
            if self._disks.get(name).instance == instance:
                await self.stop(name)
            if self._disks.get(name).instance == instance:
                gone = self._disks.take_out(name)
                self._changes.add("tenant.destroyed", name)
                await asyncio.to_thread(shutil.rmtree, gone)
                return True
        return False

    async def rename(self, name: str, domain: str | None) -> None:
        self._disks.change(name, domain=domain)
        self._changes.add("incus.instance-updated", name)

    async def resize(self, name: str, size: str) -> None:
        self._disks.get(name)
        raise InvalidParams(
            "the local runtime has no limits, so its tenants have no size; only tenants in Incus have",
            field="size",
            reason="not_enforced",
        )

    async def clone(
        self, name: str, new: str, *, domain: str | None = None, snapshot: str | None = None
    ) -> TenantInstance:
        disk = self._disks.disk(name) if snapshot is None else self._disks.kept(name, snapshot)
        await self.make(new, domain, disk=disk)
        await self.start(new)
        return self._disks.get(new)


class LocalSnapshots:
    """Implements `gateway.runtime.DiskSnapshots`."""

    def __init__(self, tenants: LocalTenants, disks: LocalDisks, changes: LocalChanges) -> None:
        self._tenants, self._disks, self._changes = tenants, disks, changes

    async def list(self, tenant: str) -> Sequence[DiskSnapshot]:
        return await self._disks.snapshots(tenant)

    async def create(self, tenant: str, name: str) -> DiskSnapshot:
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


class LocalRuntime:
    """A `TenantRuntime` of folders under `state_dir/tenants`. An async context manager."""

    def __init__(self, settings: Settings, removed: Removed = unheard) -> None:
        self._settings = settings
        self.removed = removed
        member = "local" if settings.local_member is None else settings.local_member.name
        self.disks = LocalDisks(settings.state_dir / "tenants", member)
        self._real_home = os.path.realpath(self.disks.home)  # as commands see it
        self.locations: Mapping[str, Any] = Folders(self._real_home, "root").to_dict()
        self.changes = LocalChanges(self.disks)
        self.commands = LocalCommands(settings, self.disks)
        self.tenants = LocalTenants(settings, self.disks, self.commands, self.changes)
        self.snapshots = LocalSnapshots(self.tenants, self.disks, self.changes)
        self.usage = LocalUsage(self.disks, self.commands)

    async def __aenter__(self) -> LocalRuntime:
        self.disks.home.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.commands.aclose()

    async def filesystem(self, name: str) -> FilesystemRoot:
        self.disks.record(name)  # raises `NotFound`
        return FilesystemRoot(name, self._settings.workspace, prefix=f"{self._real_home}/{name}/root")

    async def ready(self) -> None:
        return

    async def prepare(self, tenants: Sequence[str]) -> None:
        pass

    async def leave(self) -> None:
        pass

    async def sweep(self) -> int:
        return 0  # processes left by a killed gateway cannot be told from others on this machine
