"""The services that all deployments work with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gateway.caddy import Caddy
from gateway.deployments.health import Health
from gateway.deployments.record import Record, Register
from gateway.deployments.verify import Verifier
from gateway.errors import NotFound
from gateway.events import Bus
from gateway.limits.capacity import Capacity, DiskSpace
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains
from gateway.ownership.names import Names
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantRuntime
from gateway.runtime.sites import Sites
from gateway.settings import Settings


class KeepsAwake(Protocol):
    """Keeps tenants from sleeping; see `gateway.lifecycle.idle.Idle`."""

    def use(self, tenant: str) -> contextlib.AbstractAsyncContextManager[None]: ...


class RemoteRoutes(Protocol):
    """Knows where the domains of other servers' sites lead."""

    async def wanted(self) -> Mapping[str, str]:
        """Return the target of each such domain."""
        ...


def _nothing_moves(tenant: str) -> bool:
    return False


@dataclass(slots=True, kw_only=True)
class Context:
    """The services that deployments work with.

    Without `idle` tenants never sleep, and without `names` each name is used for the first time. Without
    `room` and `capacity` there is always disk and memory for another tenant. Without `workers` updates remove
    no files. In a cluster `remote` says where other members' sites are, and `moving` which tenants leave.
    """

    runtime: TenantRuntime
    sites: Sites
    caddy: Caddy
    domains: Domains
    register: Register
    bus: Bus
    settings: Settings
    idle: KeepsAwake | None = None
    names: Names | None = None
    room: DiskSpace | None = None
    capacity: Capacity | None = None
    workers: Workers | None = None
    health: Health | None = None
    pressure: Pressure | None = None
    remote: RemoteRoutes | None = None
    moving: Callable[[str], bool] = _nothing_moves
    verifier: Verifier = field(init=False)

    def __post_init__(self) -> None:
        self.verifier = Verifier(self.sites.services, self.caddy, self.settings, self.pressure)

    def use(self, tenant: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Keep a tenant awake while the context is open."""
        return contextlib.nullcontext() if self.idle is None else self.idle.use(tenant)

    def ended(self, tenant: str) -> float:
        """Return when the last tenant of a name ended, 0 if there was none."""
        return 0.0 if self.names is None else self.names.ended(tenant)

    async def admit(self) -> None:
        """Raise if there is no disk space for another tenant."""
        if self.room is not None:
            await self.room.admit()

    def promise(self, tenant: str, memory: str | None) -> contextlib.AbstractAsyncContextManager[None]:
        """Reserve memory for a tenant while the context is open, or raise."""
        return contextlib.nullcontext() if self.capacity is None else self.capacity.promise(tenant, memory)

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
