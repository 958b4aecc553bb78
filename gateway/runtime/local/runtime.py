"""The local runtime, in parts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from gateway.rootfs import FilesystemRoot
from gateway.rootfs.locations import Folders
from gateway.runtime import Removed, unheard
from gateway.runtime.local.changes import LocalChanges
from gateway.runtime.local.commands import LocalCommands
from gateway.runtime.local.disks import LocalDisks
from gateway.runtime.local.snapshots import LocalSnapshots
from gateway.runtime.local.tenants import LocalTenants
from gateway.runtime.local.usage import LocalUsage
from gateway.settings import Settings


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
