"""Tenants of the local runtime: create, change, start, stop and remove them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.errors import InvalidParams, NotFound
from gateway.runtime import Tenant
from gateway.runtime.local.changes import LocalChanges
from gateway.runtime.local.commands import LocalCommands
from gateway.runtime.local.disks import LocalDisks
from gateway.settings import Settings


class LocalTenants:
    """Implements `gateway.runtime.Tenants`. A tenant runs if its record says so."""

    def __init__(
        self, settings: Settings, disks: LocalDisks, commands: LocalCommands, changes: LocalChanges
    ) -> None:
        self._settings, self._disks = settings, disks
        self._commands, self._changes = commands, changes

    async def list(self, *, addresses: bool = True) -> list[Tenant]:
        return self._disks.list()

    async def get(self, name: str) -> Tenant:
        return self._disks.get(name)

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> Tenant:
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
    ) -> Tenant:
        disk = self._disks.disk(name) if snapshot is None else self._disks.kept(name, snapshot)
        await self.make(new, domain, disk=disk)
        await self.start(new)
        return self._disks.get(new)
