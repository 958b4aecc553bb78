"""A tenant's lifecycle as clients ask for it: start to destroy, snapshots, clones, domain and size.

Requests come as values and are answered with values; `api.access` checks the caller before. A change of a
tenant waits for the one before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final
from weakref import WeakValueDictionary

from pydantic import Field

from gateway import protocol
from gateway.auth.tokens import Token
from gateway.caddy import Caddy, asleep, site_url
from gateway.errors import Conflict, GatewayError, InvalidParams, RateLimited, Timeout
from gateway.events import Bus
from gateway.hostnames import normalized
from gateway.limits.capacity import Capacity
from gateway.limits.disk import DiskSpace
from gateway.ownership.domains import Domains
from gateway.ownership.names import Names
from gateway.rootfs.workers import Workers
from gateway.runtime import (
    SNAPSHOT_NAME,
    TENANT_NAME,
    Snapshot,
    Tenant,
    TenantEvent,
    TenantRuntime,
    sizes,
)
from gateway.runtime.probe import answer, refusal
from gateway.runtime.probe import ask as probe
from gateway.runtime.sites import Site, Sites
from gateway.settings import Settings

log = logging.getLogger(__name__)

_REFUSES: Final = 2.0  # seconds in which a site says whether it refuses its new domain
_RETURNS: Final = 5.0  # seconds that are waited for a site that was started again
_ADDRESSED: Final = 10.0  # seconds in which a started container gets its address
# changes whose events are still to come; of more the oldest are told as the gateway's own
_ASKED: Final = 1000


@dataclass(frozen=True, slots=True)
class Ask:
    """One request about a tenant that its token covers."""

    tenant: str
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: Any
    token: Token


class SnapshotBody(protocol.Params):
    name: Annotated[str, Field(max_length=63)] | None = None


class RenameBody(protocol.Params):
    domain: Annotated[str, Field(max_length=253)] | None


class ResizeBody(protocol.Params):
    size: Annotated[str, Field(max_length=63)]


class CloneBody(protocol.Params):
    tenant: Annotated[str, Field(max_length=63)]
    snapshot: Annotated[str, Field(max_length=63)] | None = None


class Lifecycle:
    """The lives of all tenants. Used from the event loop only."""

    def __init__(
        self,
        runtime: TenantRuntime,
        sites: Sites,
        caddy: Caddy,
        domains: Domains,
        workers: Workers,
        bus: Bus,
        names: Names,
        room: DiskSpace,
        capacity: Capacity,
        settings: Settings,
    ) -> None:
        self._runtime, self._sites, self._caddy, self._domains = runtime, sites, caddy, domains
        self._bus = bus
        self._names, self._room, self.capacity = names, room, capacity
        self._workers = workers
        self._settings = settings
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # callers of changes of snapshots whose events are still to come
        self._asked: OrderedDict[tuple[str, str, str], str] = OrderedDict()

    # --- start to destroy ---------------------------------------------------------------------------

    async def start(self, ask: Ask) -> Mapping[str, Any]:
        async with self.capacity.promise(ask.tenant):
            return await self._change(ask.tenant, self._runtime.start, holds_files=False)

    async def stop(self, ask: Ask) -> Mapping[str, Any]:
        return await self._change(ask.tenant, self._stay_stopped)

    async def restart(self, ask: Ask) -> Mapping[str, Any]:
        return await self._change(ask.tenant, self._runtime.restart)

    async def destroy(self, ask: Ask) -> None:
        """Remove a tenant; what comes under its name after this was answered is another's."""
        async with self.alone(ask.tenant):
            await self.let_go(ask.tenant)
            instance = self._names.holder(ask.tenant)
            await self._runtime.destroy(ask.tenant)
            async with self._domains.deciding(), self._caddy.changing:
                for domain in await self._domains.left(ask.tenant):
                    self._caddy.unset(domain)
            await self._names.over(ask.tenant, instance)

    async def clone(self, ask: Ask) -> Mapping[str, Any]:
        """Copy a tenant under a new name; it has no domain until it is given one."""
        body = protocol.validate(CloneBody, ask.body)
        if not TENANT_NAME.fullmatch(body.tenant) or not ask.token.covers(body.tenant):
            raise InvalidParams(
                f"{body.tenant!r} is not a tenant name that this token covers", field="tenant"
            )
        await self._room.admit()
        limit = (await self._runtime.get(ask.tenant)).limits.get("memory") or self._settings.tenant_memory
        async with self.capacity.promise(body.tenant, limit):
            made = await self._runtime.clone(ask.tenant, body.tenant, snapshot=body.snapshot)
        return described(made, self._settings)

    async def rename(self, ask: Ask) -> Mapping[str, Any]:
        """Give the tenant another domain, or none; its name stays. Its route is there when this returns."""
        body = protocol.validate(RenameBody, ask.body)
        domain = None if body.domain is None else normalized(body.domain)
        if domain is not None:
            await self._domains.permit(ask.token, domain)
        async with self.alone(ask.tenant):  # a restore would write the old domain back
            async with self._domains.moving(ask.tenant, domain) as before, self._caddy.changing:
                await self._runtime.rename(ask.tenant, domain)
                site = await self._lead(ask.tenant, domain)
                if before not in (None, domain) and self._domains.serves(before, ask.tenant):
                    self._caddy.unset(before)
            await self._reached(ask.tenant, domain, site)
            if domain is not None and domain != before:
                await self._have_allowed(ask.tenant, domain)
        if domain != before:
            self._bus.publish(
                "tenant.renamed", ask.tenant, {"domain": domain, "from": before, "by": ask.token.subject}
            )
        return described(await self._runtime.get(ask.tenant), self._settings)

    async def resize(self, ask: Ask) -> Mapping[str, Any]:
        """Give the tenant the limits of another size, while it runs: all of them, or none."""
        size = sizes.known(protocol.validate(ResizeBody, ask.body).size)
        async with self.alone(ask.tenant):
            before = await self._runtime.get(ask.tenant)
            self._domains.undisturbed(ask.tenant)
            memory = sizes.SIZES[size].get("memory", self._settings.tenant_memory)
            # one that does not run is promised nothing yet
            running = before.status != "stopped"
            async with self.capacity.promise(ask.tenant, memory) if running else contextlib.nullcontext():
                await self._runtime.resize(ask.tenant, size)
            now = await self._runtime.get(ask.tenant)
        facts = {"size": size, "limits": dict(now.limits), "from": dict(before.limits)}
        self._bus.publish("tenant.resized", ask.tenant, {**facts, "by": ask.token.subject})
        return described(now, self._settings)

    async def _lead(self, tenant: str, domain: str | None) -> Site | None:
        """Route a tenant's domain to its site, if that is known yet; return the site."""
        site = next((site for site in await self._sites.listed() if site.tenant == tenant), None)
        if domain is not None and site is not None and site.domain == domain and site.exposure is not None:
            target = site.exposure.target
            self._caddy.set(domain, asleep(target) if site.asleep else target)
        return site

    async def _reached(self, tenant: str, domain: str | None, site: Site | None) -> None:
        """Wait until a site that was just started has an address to lead its domain to; a while at most."""
        port = (await self._runtime.get(tenant)).port
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ADDRESSED):
                while site is not None and site.running and site.exposure is None and port is not None:
                    if site.shares_address or domain is None or not self._domains.serves(domain, tenant):
                        return
                    await asyncio.sleep(0.1)  # DHCP sends no notice here
                    async with self._caddy.changing:
                        site = await self._lead(tenant, domain)

    async def _have_allowed(self, tenant: str, domain: str) -> None:
        """Restart a running site that refuses its tenant's new domain, with the setting that allows it.

        Waits a while for it, so that the next visitor finds it. The health checks report whether that helped.
        """
        site = next((site for site in await self._sites.listed() if site.tenant == tenant), None)
        if site is None or not site.running or site.exposure is None or site.deployment is not None:
            return
        where = site.exposure
        try:
            status = await probe(where.address, where.port, site.health, 0.5, _REFUSES, host=domain)
            if not await refusal(where.address, where.port, site.health, domain, status):
                return
            await self._sites.allow(tenant, domain)
            await self._sites.restart(tenant)
            await answer(where.address, where.port, site.health, _RETURNS, host=domain)
        except (OSError, ValueError):  # TimeoutError among them
            return  # it says nothing of any domain
        except GatewayError as error:
            log.warning("the site of %s is not told its new domain: %s", tenant, error.message)

    async def _stay_stopped(self, tenant: str) -> None:
        await self._runtime.stop(tenant)
        if (await self._runtime.get(tenant)).asleep:
            await self._runtime.mark_asleep(tenant, False)

    async def _change(
        self, tenant: str, change: Callable[[str], Awaitable[None]], *, holds_files: bool = True
    ) -> Mapping[str, Any]:
        async with self.alone(tenant):
            if holds_files:
                await self.let_go(tenant)
            await change(tenant)
            return described(await self._runtime.get(tenant), self._settings)

    @contextlib.asynccontextmanager
    async def alone(self, tenant: str) -> AsyncIterator[None]:
        """Keep other changes of this gateway out; those of others Incus refuses itself."""
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

    async def let_go(self, tenant: str) -> None:
        """End the tenant's file workers: they would hold its disk."""
        await self._runtime.get(tenant)  # an unknown one has none
        await self._workers.forget(tenant)

    # --- snapshots ----------------------------------------------------------------------------------

    async def snapshots(self, ask: Ask) -> Mapping[str, Any]:
        return {"snapshots": [_to_dict(kept) for kept in await self._runtime.snapshots(ask.tenant)]}

    async def snapshot(self, ask: Ask) -> Mapping[str, Any]:
        body = protocol.validate(SnapshotBody, ask.body)
        name = body.name or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        if not SNAPSHOT_NAME.fullmatch(name):
            raise InvalidParams("a snapshot's name may have letters, digits, dots and dashes", field="name")
        async with self.alone(ask.tenant):
            kept = await self._runtime.snapshots(ask.tenant)
            if len(kept) >= self._settings.max_snapshots:
                raise RateLimited(
                    f"the tenant has {len(kept)} snapshots, the most it may; raise "
                    "GATEWAY_MAX_SNAPSHOTS, or delete one",
                    limit=self._settings.max_snapshots,
                )
            if any(one.name == name for one in kept):
                raise Conflict(f"tenant {ask.tenant} has a snapshot {name}; choose another name")
            async with self._room.snapshot(ask.tenant, name):
                with self._asking(ask, "tenant.snapshot.created", name):
                    return _to_dict(await self._runtime.snapshot(ask.tenant, name))

    async def restore(self, ask: Ask) -> Mapping[str, Any]:
        snapshot = _named(ask)

        async def restore(tenant: str) -> None:
            with self._asking(ask, "tenant.snapshot.restored", snapshot):
                await self._runtime.restore(tenant, snapshot)

        return await self._change(ask.tenant, restore)

    async def delete_snapshot(self, ask: Ask) -> None:
        snapshot = _named(ask)
        async with self.alone(ask.tenant):
            async with self._room.deleting(ask.tenant, snapshot):
                with self._asking(ask, "tenant.snapshot.deleted", snapshot):
                    await self._runtime.delete_snapshot(ask.tenant, snapshot)

    @contextlib.contextmanager
    def _asking(self, ask: Ask, kind: str, snapshot: str) -> Iterator[None]:
        """Have the event of this change name the caller."""
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
        """Forget a tenant that is destroyed: the next one of its name starts from nothing."""
        await self._room.forget(tenant)

    def explained(self, event: TenantEvent) -> TenantEvent:
        """Return an event with its caller, if that was a client: Incus only sees the gateway."""
        if event.tenant is None or "snapshot" not in event.data:
            return event
        by = self._asked.pop((event.tenant, event.type, event.data["snapshot"]), None)
        return event if by is None else replace(event, data={**event.data, "by": by})


def described(tenant: Tenant, settings: Settings) -> dict[str, Any]:
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


def _to_dict(kept: Snapshot) -> dict[str, Any]:
    return {"name": kept.name, "created": kept.created, "size": kept.size}


def _named(ask: Ask) -> str:
    """Return the snapshot of the path; one that no snapshot can be called does not exist."""
    name = ask.path["snapshot"]
    return name if SNAPSHOT_NAME.fullmatch(name) else "-"
