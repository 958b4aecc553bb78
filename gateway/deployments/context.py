"""The services that all deployments work with."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gateway.caddy import Caddy
from gateway.deployments.health import Health
from gateway.deployments.record import Record
from gateway.deployments.register import Register
from gateway.deployments.verify import Verifier
from gateway.errors import NotFound
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantRuntime
from gateway.runtime.sites import Sites
from gateway.settings import Settings

Promise = Callable[[str, str | None], contextlib.AbstractAsyncContextManager[None]]
"""Reserves memory for a tenant, by name and limit, while the context is open, or refuses."""


class RemoteRoutes(Protocol):
    """Knows where the domains of other servers' sites lead."""

    async def wanted(self) -> Mapping[str, str]:
        """Return the target of each such domain."""
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """The services that phases and recovery share; `Deployments` describes the functions."""

    runtime: TenantRuntime
    sites: Sites
    caddy: Caddy
    domains: Domains
    register: Register
    verifier: Verifier
    workers: Workers | None
    settings: Settings
    use: Callable[[str], contextlib.AbstractAsyncContextManager[None]]
    admit: Callable[[], Awaitable[None]]
    promise: Promise
    health: Health | None
    pressure: Pressure | None
    remote: RemoteRoutes | None

    def exchanging(self, tenant: str) -> contextlib.AbstractContextManager[None]:
        """End the file tools that still work in the former workspace folder."""
        return contextlib.nullcontext() if self.workers is None else self.workers.exchanges.of(tenant)

    async def is_there(self, record: Record) -> bool:
        """Return whether a deployment's tenant is still the same instance."""
        try:
            there = await self.runtime.tenants.get(record.tenant)
        except NotFound:
            return False
        return record.instance in (None, there.instance)
