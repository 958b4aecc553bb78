"""What the local runtime's tenants use of this machine, as far as it can be told apart."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.runtime import Space, Tenant
from gateway.runtime.local.commands import LocalCommands
from gateway.runtime.local.disks import LocalDisks, size
from gateway.runtime.visits import TenantPort, visited


class LocalUsage:
    """Implements `gateway.runtime.Usage`."""

    def __init__(self, disks: LocalDisks, commands: LocalCommands) -> None:
        self._disks, self._commands = disks, commands

    async def metrics(self, name: str) -> Mapping[str, Any]:
        self._disks.get(name)
        return {"processes": self._commands.running(name)}

    async def visited(self, tenants: Sequence[Tenant]) -> Mapping[str, float]:
        places = {t.name: TenantPort(t.port, "127.0.0.1") for t in tenants if t.port is not None}
        return await asyncio.to_thread(visited, places)

    async def held(self, name: str) -> int | None:
        return None

    async def unshared(self, name: str) -> int | None:
        return await asyncio.to_thread(size, self._disks.disk(name))

    async def space(self) -> Space | None:
        found = shutil.disk_usage(self._disks.home)
        return Space(found.total, found.used)
