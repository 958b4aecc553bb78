"""The mark of a tenant that sleeps: in Incus, and in its site's route, so that Caddy asks for it first."""

from __future__ import annotations

from gateway.caddy import Caddy, asleep
from gateway.ownership.domains import Domains
from gateway.runtime import Tenants
from gateway.runtime.sites import Site, Sites, site_of


class SleepMarks:
    """Sets and removes the marks. Neither starts nor stops a tenant."""

    def __init__(self, tenants: Tenants, sites: Sites, caddy: Caddy, domains: Domains) -> None:
        self._tenants, self._sites, self._caddy, self._domains = tenants, sites, caddy, domains

    async def set(self, tenant: str) -> None:
        """Mark a tenant as asleep."""
        async with self._caddy.changing:
            await self._tenants.mark_asleep(tenant, True)
            site = await self._served(tenant)
            target = None if site is None else self._caddy.get(site.domain)
            if site is not None and target is not None:
                self._caddy.set(site.domain, asleep(target))

    async def remove(self, tenant: str) -> None:
        """Mark a tenant as awake, and route its domain to its site again."""
        async with self._caddy.changing:
            await self._tenants.mark_asleep(tenant, False)
            site = await self._served(tenant)
            if site is not None and site.exposure is not None and self._caddy.sleeps(site.domain):
                self._caddy.set(site.domain, site.exposure.target)

    async def _served(self, tenant: str) -> Site | None:
        """Return a tenant's site if the domain that it carries is its own."""
        site = await site_of(self._sites, tenant)
        return site if site is not None and self._domains.serves(site.domain, tenant) else None
