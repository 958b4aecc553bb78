"""The services of the local runtime's sites, as far as they run."""

from __future__ import annotations

from collections.abc import Callable, Collection

from gateway.runtime.listening import ListeningSocket
from gateway.runtime.local.service import LocalService
from gateway.runtime.sites import Life, Service, Side


class LocalServices:
    """Implements `gateway.runtime.sites.SiteServices`."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, Side], LocalService] = {}

    async def close(self) -> None:
        for key in list(self._running):
            await self.stop(*key)

    def find(self, tenant: str, side: Side) -> LocalService | None:
        """Return a side's service if it was started."""
        return self._running.get((tenant, side))

    async def start(self, tenant: str, side: Side, service: LocalService) -> None:
        """Start a side's service. Raises `ExecFailed` if it cannot be started at all."""
        await service.start()
        self._running[tenant, side] = service

    async def stop(self, tenant: str, side: Side) -> None:
        """Stop a side's service if it was started."""
        service = self._running.pop((tenant, side), None)
        if service is not None:
            await service.stop()

    async def state(self, tenant: str, side: Side) -> Service | None:
        service = self.find(tenant, side)
        return None if service is None else await service.look()

    async def life(self, tenant: str, side: Side) -> Life | None:
        return None  # `state` costs nothing here

    async def report_end(self, tenant: str, ended: Callable[[], None]) -> bool:
        return False

    async def listening(self, tenant: str) -> Collection[ListeningSocket]:
        service = await self.state(tenant, "live")
        return () if service is None else service.listens

    async def log(self, tenant: str, side: Side) -> str:
        service = self.find(tenant, side)
        return "" if service is None else service.said
