"""Makes a running site answer at its tenant's new domain: its route, its address, its permission."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from gateway.caddy import Caddy, asleep
from gateway.errors import GatewayError
from gateway.ownership.domains import Domains
from gateway.runtime import Tenants
from gateway.runtime.probe import answer, refusal
from gateway.runtime.probe import ask as probe
from gateway.runtime.sites import Site, Sites, site_of

log = logging.getLogger(__name__)

_REFUSES: Final = 2.0  # seconds to find out whether a site refuses its new domain
_RETURNS: Final = 5.0  # seconds to wait for a restarted site
_ADDRESSED: Final = 10.0  # seconds for a started container to get its address


class SiteDomains:
    """The sites of tenants whose domains change."""

    def __init__(self, tenants: Tenants, sites: Sites, caddy: Caddy, domains: Domains) -> None:
        self._tenants, self._sites, self._caddy, self._domains = tenants, sites, caddy, domains

    async def route(self, tenant: str, domain: str | None) -> Site | None:
        """Route a tenant's domain to its site if that is known; return the site."""
        site = await site_of(self._sites, tenant)
        if domain is not None and site is not None and site.domain == domain and site.exposure is not None:
            target = site.exposure.target
            self._caddy.set(domain, asleep(target) if site.asleep else target)
        return site

    async def reached(self, tenant: str, domain: str | None, site: Site | None) -> None:
        """Wait, up to a limit, until a just started site has an address for its domain's route."""
        port = (await self._tenants.get(tenant)).port
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ADDRESSED):
                while site is not None and site.running and site.exposure is None and port is not None:
                    if site.shares_address or domain is None or not self._domains.serves(domain, tenant):
                        return
                    await asyncio.sleep(0.1)  # DHCP notifies nobody here
                    async with self._caddy.changing:
                        site = await self.route(tenant, domain)

    async def allow(self, tenant: str, domain: str) -> None:
        """If a running site refuses its tenant's new domain, restart it with the setting that allows it.

        Waits a while for the site, so that the next visitor finds it. Health checks report whether it helped.
        """
        site = await site_of(self._sites, tenant)
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
            return  # so it does not refuse the domain
        except GatewayError as error:
            log.warning("cannot give the site of %s its new domain: %s", tenant, error.message)
