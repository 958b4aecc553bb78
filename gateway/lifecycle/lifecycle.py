"""A tenant's lifecycle on request: start to destroy, snapshots, clones, domain and size.

Requests and answers are values; `api.access` has checked the caller. Changes of one tenant run one after
another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from weakref import WeakValueDictionary

from gateway import protocol
from gateway.auth.tokens import Token
from gateway.caddy import Caddy, asleep, site_url
from gateway.errors import Conflict, GatewayError, InvalidParams, RateLimited, Timeout
from gateway.events import Bus
from gateway.hostnames import normalized
from gateway.limits.capacity import Capacity, DiskSpace
from gateway.ownership.domains import Domains
from gateway.ownership.names import Names
from gateway.protocol import types
from gateway.rootfs.workers import Workers
from gateway.runtime import (
    SNAPSHOT_NAME,
    TENANT_NAME,
    DiskSnapshot,
    TenantEvent,
    TenantInstance,
    TenantInstances,
    TenantRuntime,
    sizes,
)
from gateway.runtime.probe import answer, refusal
from gateway.runtime.probe import ask as probe
from gateway.runtime.sites import Sites, TenantSite, site_of
from gateway.settings import Settings

# changes whose events have not arrived; above that, the oldest are reported as the gateway's own
_ASKED: Final = 1000


@dataclass(frozen=True, slots=True)
class Ask:
    """One request about a tenant; the token covers it."""

    tenant: str
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: Any
    token: Token


class SnapshotBody(protocol.Params):
    name: types.SnapshotName | None = None


class RenameBody(protocol.Params):
    domain: types.DomainName | None


class ResizeBody(protocol.Params):
    size: types.SizeName


class CloneBody(protocol.Params):
    tenant: types.TenantName
    snapshot: types.SnapshotName | None = None


class Lifecycle:
    """The lifecycle of all tenants. Used from the event loop only."""

    def __init__(
        self,
        runtime: TenantRuntime,
        routes: SiteRoutes,
        workers: Workers,
        bus: Bus,
        names: Names,
        room: DiskSpace,
        capacity: Capacity,
        settings: Settings,
    ) -> None:
        self._tenants, self._snapshots = runtime.tenants, runtime.snapshots
        self._routes, self.caddy, self._domains = routes, routes.caddy, routes.domains
        self._workers, self._bus, self._names = workers, bus, names
        self._room, self.capacity, self._settings = room, capacity, settings
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # callers of snapshot changes whose events have not arrived
        self._asked: OrderedDict[tuple[str, str, str], str] = OrderedDict()

    # --- start to destroy ---------------------------------------------------------------------------

    async def start(self, ask: Ask) -> Mapping[str, Any]:
        async with self.capacity.promise(ask.tenant):
            return await self._change(ask.tenant, self._tenants.start, holds_files=False)

    async def stop(self, ask: Ask) -> Mapping[str, Any]:
        return await self._change(ask.tenant, self._stay_stopped)

    async def restart(self, ask: Ask) -> Mapping[str, Any]:
        return await self._change(ask.tenant, self._tenants.restart)

    async def destroy(self, ask: Ask) -> None:
        """Remove a tenant. Once this returns, its name may belong to another."""
        async with self.alone(ask.tenant):
            await self.end_workers(ask.tenant)
            instance = self._names.holder(ask.tenant)
            await self._tenants.destroy(ask.tenant)
            async with self._domains.deciding(), self.caddy.changing:
                for domain in await self._domains.left(ask.tenant):
                    self.caddy.unset(domain)
            await self._names.over(ask.tenant, instance)

    async def clone(self, ask: Ask) -> Mapping[str, Any]:
        """Copy a tenant under a new name, without a domain."""
        body = protocol.validate(CloneBody, ask.body)
        if not TENANT_NAME.fullmatch(body.tenant) or not ask.token.covers(body.tenant):
            raise InvalidParams(
                f"{body.tenant!r} is not a tenant name that this token covers", field="tenant"
            )
        await self._room.admit()
        limit = (await self._tenants.get(ask.tenant)).limits.get("memory") or self._settings.tenant_memory
        async with self.capacity.promise(body.tenant, limit):
            made = await self._tenants.clone(ask.tenant, body.tenant, snapshot=body.snapshot)
        return described(made, self._settings)

    async def rename(self, ask: Ask) -> Mapping[str, Any]:
        """Give the tenant another domain, or none. Its name stays, and its route is set when this returns."""
        body = protocol.validate(RenameBody, ask.body)
        domain = None if body.domain is None else normalized(body.domain)
        if domain is not None:
            await self._domains.permit(ask.token, domain)
        async with self.alone(ask.tenant):  # a concurrent restore would bring the old domain back
            async with self._domains.moving(ask.tenant, domain) as before, self.caddy.changing:
                await self._tenants.rename(ask.tenant, domain)
                site = await self._routes.route(ask.tenant, domain)
                if before not in (None, domain) and self._domains.serves(before, ask.tenant):
                    self.caddy.unset(before)
            await self._routes.reached(ask.tenant, domain, site)
            if domain is not None and domain != before:
                await self._routes.allow(ask.tenant, domain)
        if domain != before:
            self._bus.publish(
                "tenant.renamed", ask.tenant, {"domain": domain, "from": before, "by": ask.token.subject}
            )
        return described(await self._tenants.get(ask.tenant), self._settings)

    async def resize(self, ask: Ask) -> Mapping[str, Any]:
        """Apply another size's limits to the tenant while it runs: all or none of them."""
        size = sizes.known(protocol.validate(ResizeBody, ask.body).size)
        async with self.alone(ask.tenant):
            before = await self._tenants.get(ask.tenant)
            self._domains.undisturbed(ask.tenant)
            memory = sizes.SIZES[size].get("memory", self._settings.tenant_memory)
            # nothing is promised to a stopped one yet
            running = before.status != "stopped"
            async with self.capacity.promise(ask.tenant, memory) if running else contextlib.nullcontext():
                await self._tenants.resize(ask.tenant, size)
            now = await self._tenants.get(ask.tenant)
        facts = {"size": size, "limits": dict(now.limits), "from": dict(before.limits)}
        self._bus.publish("tenant.resized", ask.tenant, {**facts, "by": ask.token.subject})
        return described(now, self._settings)

    async def _stay_stopped(self, tenant: str) -> None:
        await self._tenants.stop(tenant)
        if (await self._tenants.get(tenant)).asleep:
            await self._tenants.mark_asleep(tenant, False)

    async def _change(
        self, tenant: str, change: Callable[[str], Awaitable[None]], *, holds_files: bool = True
    ) -> Mapping[str, Any]:
        async with self.alone(tenant):
            if holds_files:
                await self.end_workers(tenant)
            await change(tenant)
            return described(await self._tenants.get(tenant), self._settings)

    @contextlib.asynccontextmanager
    async def alone(self, tenant: str) -> AsyncIterator[None]:
        """Keep out this gateway's other changes; Incus itself refuses those made by others."""
        lock = self._changing.setdefault(tenant, asyncio.Lock())
        try:
            async with asyncio.timeout(self._settings.lifecycle_timeout):
                await lock.acquire()
        except TimeoutError:
            raise Timeout(f"tenant {tenant} is busy with another change; try again later") from None
        try:
            yield
        finally:
            lock.release()

    async def end_workers(self, tenant: str) -> None:
        """End the tenant's file workers, which would keep its disk busy."""
        await self._tenants.get(tenant)  # raises if it does not exist
        await self._workers.forget(tenant)

    # --- snapshots ----------------------------------------------------------------------------------

    async def snapshots(self, ask: Ask) -> Mapping[str, Any]:
        return {"snapshots": [_to_dict(kept) for kept in await self._snapshots.list(ask.tenant)]}

    async def snapshot(self, ask: Ask) -> Mapping[str, Any]:
        body = protocol.validate(SnapshotBody, ask.body)
        name = body.name or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        if not SNAPSHOT_NAME.fullmatch(name):
            raise InvalidParams(
                "a snapshot's name may only have letters, digits, dots and dashes", field="name"
            )
        async with self.alone(ask.tenant):
            kept = await self._snapshots.list(ask.tenant)
            if len(kept) >= self._settings.max_snapshots:
                raise RateLimited(
                    f"the tenant has {len(kept)} snapshots, its limit; raise "
                    "GATEWAY_MAX_SNAPSHOTS, or delete one",
                    limit=self._settings.max_snapshots,
                )
            if any(one.name == name for one in kept):
                raise Conflict(f"tenant {ask.tenant} already has a snapshot {name}; choose another name")
            async with self._room.snapshot(ask.tenant, name):
                with self._naming_caller(ask, "tenant.snapshot.created", name):
                    return _to_dict(await self._snapshots.create(ask.tenant, name))

    async def restore(self, ask: Ask) -> Mapping[str, Any]:
        snapshot = _named(ask)

        async def restore(tenant: str) -> None:
            with self._naming_caller(ask, "tenant.snapshot.restored", snapshot):
                await self._snapshots.restore(tenant, snapshot)

        return await self._change(ask.tenant, restore)

    async def delete_snapshot(self, ask: Ask) -> None:
        snapshot = _named(ask)
        async with self.alone(ask.tenant):
            async with self._room.deleting(ask.tenant, snapshot):
                with self._naming_caller(ask, "tenant.snapshot.deleted", snapshot):
                    await self._snapshots.delete(ask.tenant, snapshot)

    @contextlib.contextmanager
    def _naming_caller(self, ask: Ask, kind: str, snapshot: str) -> Iterator[None]:
        """Let the event of this change name the caller."""
        key = (ask.tenant, kind, snapshot)
        self._asked[key] = ask.token.subject
        while len(self._asked) > _ASKED:
            self._asked.popitem(last=False)
        try:
            yield
        except BaseException:
            self._asked.pop(key, None)
            raise

    async def forget(self, tenant: str) -> None:
        """Forget a destroyed tenant, so that the next one of its name starts from nothing."""
        await self._room.forget(tenant)

    def explained(self, event: TenantEvent) -> TenantEvent:
        """Return an event with its caller if a client made the change; Incus only sees the gateway."""
        if event.tenant is None or "snapshot" not in event.data:
            return event
        by = self._asked.pop((event.tenant, event.type, event.data["snapshot"]), None)
        return event if by is None else replace(event, data={**event.data, "by": by})


def described(tenant: TenantInstance, settings: Settings) -> dict[str, Any]:
    """Return a tenant as clients see it."""
    return {
        "name": tenant.name,
        "domain": tenant.domain,
        "status": tenant.status,
        "asleep": tenant.asleep and tenant.status != "running",
        "address": tenant.address,
        "url": None if tenant.domain is None else site_url(tenant.domain, settings),
        "port": tenant.port,
        "created": tenant.created,
        "limits": dict(tenant.limits),
        "location": tenant.location,
    }


def _to_dict(kept: DiskSnapshot) -> dict[str, Any]:
    return {"name": kept.name, "created": kept.created, "size": kept.size}


def _named(ask: Ask) -> str:
    """Return the snapshot named in the path. Raises `NotFound` for an impossible name."""
    name = ask.path["snapshot"]
    return name if SNAPSHOT_NAME.fullmatch(name) else "-"


log = logging.getLogger(__name__)

_REFUSES: Final = 2.0  # seconds to find out whether a site refuses its new domain
_RETURNS: Final = 5.0  # seconds to wait for a restarted site
_ADDRESSED: Final = 10.0  # seconds for a started container to get its address


class SiteRoutes:
    """The routes of tenants' sites, as their domains change and as they sleep and wake."""

    def __init__(self, tenants: TenantInstances, sites: Sites, caddy: Caddy, domains: Domains) -> None:
        self.sites, self.caddy, self.domains = sites, caddy, domains
        self._tenants = tenants

    async def route(self, tenant: str, domain: str | None) -> TenantSite | None:
        """Route a tenant's domain to its site if that is known; return the site."""
        site = await site_of(self.sites, tenant)
        if domain is not None and site is not None and site.domain == domain and site.exposure is not None:
            target = site.exposure.target
            self.caddy.set(domain, asleep(target) if site.asleep else target)
        return site

    async def reached(self, tenant: str, domain: str | None, site: TenantSite | None) -> None:
        """Wait, up to a limit, until a just started site has an address for its domain's route."""
        port = (await self._tenants.get(tenant)).port
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ADDRESSED):
                while site is not None and site.running and site.exposure is None and port is not None:
                    if site.shares_address or domain is None or not self.domains.serves(domain, tenant):
                        return
                    await asyncio.sleep(0.1)  # no event reports a DHCP lease
                    async with self.caddy.changing:
                        site = await self.route(tenant, domain)

    async def allow(self, tenant: str, domain: str) -> None:
        """If a running site refuses its tenant's new domain, restart it with the setting that allows it.

        Waits a while for the site, so that the next visitor finds it. Health checks report whether it helped.
        """
        site = await site_of(self.sites, tenant)
        if site is None or not site.running or site.exposure is None or site.deployment is not None:
            return
        where = site.exposure
        try:
            status = await probe(where.address, where.port, site.health, 0.5, _REFUSES, host=domain)
            if not await refusal(where.address, where.port, site.health, domain, status):
                return
            await self.sites.allow(tenant, domain)
            await self.sites.restart(tenant)
            await answer(where.address, where.port, site.health, _RETURNS, host=domain)
        except (OSError, ValueError):  # TimeoutError among them
            return  # so it does not refuse the domain
        except GatewayError as error:
            log.warning("cannot give the site of %s its new domain: %s", tenant, error.message)

    async def mark_asleep(self, tenant: str) -> None:
        """Mark a tenant as asleep."""
        async with self.caddy.changing:
            await self._tenants.mark_asleep(tenant, True)
            site = await self._served(tenant)
            target = None if site is None else self.caddy.get(site.domain)
            if site is not None and target is not None:
                self.caddy.set(site.domain, asleep(target))

    async def mark_awake(self, tenant: str) -> None:
        """Mark a tenant as awake, and route its domain to its site again."""
        async with self.caddy.changing:
            await self._tenants.mark_asleep(tenant, False)
            site = await self._served(tenant)
            if site is not None and site.exposure is not None and self.caddy.sleeps(site.domain):
                self.caddy.set(site.domain, site.exposure.target)

    async def _served(self, tenant: str) -> TenantSite | None:
        """Return a tenant's site if the domain that it carries is its own."""
        site = await site_of(self.sites, tenant)
        return site if site is not None and self.domains.serves(site.domain, tenant) else None
