"""The services of sites in Incus containers: as systemd tells, and cheaply as the host sees them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection

from gateway.errors import GatewayError
from gateway.runtime.incus import unit_status
from gateway.runtime.incus.lives import Ends, life
from gateway.runtime.incus.provisioning import LOOK, Provisioning
from gateway.runtime.incus.service_unit import NAMES
from gateway.runtime.listening import ListeningSocket, of_network
from gateway.runtime.sites import Life, Service, Side


class IncusServices:
    """Implements `gateway.runtime.sites.SiteServices`. `init_pid` is as in `Commands`."""

    def __init__(self, provisioning: Provisioning, init_pid: Callable[[str], Awaitable[int]]) -> None:
        self._provisioning, self._init_pid = provisioning, init_pid
        self._ends = Ends()

    def close(self) -> None:
        self._ends.close()

    async def state(self, tenant: str, side: Side) -> Service | None:
        try:
            said = await self._provisioning.script(tenant, unit_status.SCRIPT, NAMES[side], seconds=LOOK)
            return unit_status.read(said)
        except (GatewayError, TimeoutError):
            return None

    async def life(self, tenant: str, side: Side) -> Life | None:
        try:
            init_pid = await self._init_pid(tenant)
        except GatewayError:
            return None
        return await asyncio.to_thread(life, init_pid, NAMES[side]) if init_pid else None

    async def report_end(self, tenant: str, ended: Callable[[], None]) -> bool:
        try:
            init_pid = await self._init_pid(tenant)
        except GatewayError:
            return False
        return bool(init_pid) and self._ends.report(init_pid, NAMES["live"], ended)

    async def listening(self, tenant: str) -> Collection[ListeningSocket]:
        init_pid = await self._init_pid(tenant)
        try:
            folder = os.open(f"/proc/{init_pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return ()
        try:
            # asked again: an id that is still the container's was so when its folder was opened
            if not init_pid or await self._init_pid(tenant) != init_pid:
                return ()
            return await asyncio.to_thread(of_network, folder)
        finally:
            os.close(folder)

    async def log(self, tenant: str, side: Side) -> str:
        unit = f"--unit={NAMES[side]}"
        try:
            argv = ("journalctl", unit, "--lines=20", "--output=cat", "--no-pager")
            return await self._provisioning.run(tenant, argv, seconds=LOOK)
        except (GatewayError, TimeoutError):
            return ""
