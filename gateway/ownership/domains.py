"""Which tenant has each domain: the one authority for giving, taking and routing a domain.

Incus says which tenants carry a domain (`user.gateway.domain`). That may be several, since an operator can
copy an instance or write the key by hand. The claims say which of them has it, by the id of its instance, so
that a restart or a rename changes nothing (`decisions`). A deployment holds its domain from before it is
recorded until it has ended.

A domain that two tenants carry is contested: the one that has it keeps it until it gives it up, and both get
events. No other module compares domains.

In a cluster each gateway decides for its own member's tenants, and a domain that none of them has yet is
first reserved among all members (`ownership/reservations`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.auth.tokens import Token
from gateway.errors import Conflict, Forbidden, GatewayError, NotFound, Unavailable
from gateway.events import Bus
from gateway.hostnames import DomainReserved, gateway_names, matches, plain, reserved
from gateway.ownership.claims import Claim, Claims
from gateway.ownership.contests import Contests, carriers_of
from gateway.ownership.decisions import Decisions
from gateway.ownership.reservations import Reservations
from gateway.runtime import Tenant, Tenants
from gateway.runtime.sites import Site
from gateway.settings import Settings
from gateway.storage.store import Store

log = logging.getLogger(__name__)


class Domains:
    """The domains of one gateway. Create it with `opened`; used from the event loop only."""

    def __init__(self, tenants: Tenants, claims: Claims, bus: Bus, settings: Settings) -> None:
        self._tenants, self._settings, self._claims = tenants, settings, claims
        self._own = gateway_names(settings)
        self._decisions = Decisions(tenants, claims, self._own)
        self._contests = Contests(bus)
        self._moving: set[str] = set()  # domains that a tenant is being given
        self._deciding = asyncio.Lock()

    @classmethod
    async def opened(
        cls,
        tenants: Tenants,
        store: Store,
        bus: Bus,
        settings: Settings,
        shared: Reservations | None = None,
    ) -> Domains:
        """Load the claims of the last process, with what its deployments held. Raises `StoreFailed`.

        In a cluster `shared` has the domains of all its members.
        """
        return cls(tenants, await Claims.opened(store, shared), bus, settings)

    @property
    def contested(self) -> int:
        """The number of domains that several tenants carry, or that are the gateway's own."""
        return self._contests.domains

    @property
    def shared(self) -> int:
        """The number of tenants with a domain that share their address with another instance."""
        return self._contests.addresses

    # --- permission ---------------------------------------------------------------------------------

    async def permit(self, token: Token, domain: str) -> None:
        """Check that a token may give its tenants this domain. Raises `DomainReserved` and `Forbidden`.

        Only the token's own tenants are considered, so that the answer does not reveal who has the domain.
        """
        if reserved(domain, self._own):
            raise DomainReserved(domain)
        if token.coverage is None and token.allows("admin"):
            return
        if token.domains is None:
            name, _, suffix = domain.partition(".")
            if name and suffix in self._settings.domain_suffixes:
                return
        elif matches(domain, token.domains):
            return
        for tenant in await self._tenants.list():
            if token.covers(tenant.name) and plain(tenant.domain) == domain:
                return
        raise Forbidden(
            f"this token may not give a tenant the domain {domain}; ask the gateway's operator for one "
            f"that may: incus-gateway token --domain {domain}",
            reason="domain_not_allowed",
            domain=domain,
        )

    # --- deployments --------------------------------------------------------------------------------

    async def hold(self, domain: str, tenant: str, deployment: str) -> bool:
        """Hold a domain for a tenant until the deployment has ended; return whether that was possible.

        It is not if the domain is another tenant's: `confirm` raises that when the deployment runs.
        Raises `DomainReserved`, `Conflict` if another deployment holds it, and `Unavailable` if the cluster
        cannot decide.
        """
        if reserved(domain, self._own):
            raise DomainReserved(domain)
        claim = self._claims.get(domain)
        if claim is not None and claim.tenant != tenant and not claim.deployment:
            if domain in self._moving or not await self._decisions.is_over(domain, claim):
                return False
            if self._claims.get(domain) == claim:
                self._claims.forget(domain)
            claim = self._claims.get(domain)
        if claim is not None and claim.deployment:
            raise Conflict(f"a deployment of {domain} is running; wait for it", reason="domain_owned")
        if claim is not None and claim.tenant != tenant:
            return False
        return await self._claims.keep(domain, replace(claim or Claim(tenant), deployment=deployment))

    def holder(self, domain: str) -> str:
        """Return the deployment that holds a domain, "" for none."""
        claim = self._claims.get(domain)
        return "" if claim is None else claim.deployment

    async def confirm(self, domain: str, tenant: str, deployment: str, tenants: Sequence[Tenant]) -> None:
        """Confirm what a deployment holds; `tenants` is a fresh list of all tenants.

        Call it while `deciding` is held. Raises `Conflict` if the domain is another tenant's.
        """
        owner = await self._decisions.decide(domain, carriers_of(tenants).get(domain, ()))
        claim = self._claims.get(domain)
        if owner not in (None, tenant) or (claim is not None and claim.deployment not in ("", deployment)):
            raise _owned(domain)
        kept = replace(claim or Claim(tenant), tenant=tenant, deployment=deployment, confirmed=True)
        if not await self._claims.keep(domain, kept):
            raise _owned(domain)

    async def over(self, deployment: str) -> None:
        """Release what a deployment held. A tenant that carries the domain keeps it."""
        for domain, claim in self._claims.items():
            if claim.deployment == deployment:
                await self._settle(domain, claim)

    async def retain(self, deployments: Collection[str]) -> None:
        """Release what all other deployments hold, which a killed process could not do."""
        for domain, claim in self._claims.items():
            if claim.deployment and claim.deployment not in deployments:
                kept = replace(claim, deployment="", confirmed=False)
                await self._claims.keep(domain, kept if kept.instance else None)

    async def _settle(self, domain: str, claim: Claim) -> None:
        instance = claim.instance
        if claim.confirmed:  # otherwise nothing was done yet
            try:
                tenant = await self._tenants.get(claim.tenant)
                instance = (tenant.instance or "") if plain(tenant.domain) == domain else ""
            except NotFound:
                instance = ""
            except GatewayError:
                pass  # the next `look` finds out
        if self._claims.get(domain) is claim:
            await self._claims.keep(domain, Claim(claim.tenant, instance) if instance else None)

    # --- a tenant gets another domain ---------------------------------------------------------------

    def deciding(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """Keep others from deciding about domains while you list what all tenants carry."""
        return self._deciding

    @contextlib.asynccontextmanager
    async def moving(self, name: str, domain: str | None) -> AsyncIterator[str | None]:
        """Give a tenant a domain, or none. Change Incus while the context is open.

        Yields the domain that it carried. Raises `NotFound`, and `Conflict` if another tenant has the new one
        or a deployment of this tenant runs.
        """
        async with self._deciding, contextlib.AsyncExitStack() as undo:
            tenant = await self._tenants.get(name)
            self.undisturbed(name)
            carried = carriers_of(await self._tenants.list())
            before = plain(tenant.domain)
            if before is not None:
                await self._decisions.decide(before, carried.get(before, ()))
            if domain is not None:
                await self._take(domain, tenant, undo)
            yield before
            undo.pop_all()
            self._moving.discard(domain or "")
            for other, claim in self._claims.items():
                if claim.tenant == name and other != domain and not claim.deployment:
                    await self._claims.keep(other, None)

    def undisturbed(self, name: str) -> None:
        """Raise `Conflict` if a deployment of a tenant runs."""
        held = next((one for _, one in self._claims.items() if one.tenant == name and one.deployment), None)
        if held is not None:
            raise Conflict(
                "a deployment of this tenant runs; wait for it, or cancel it", deployment=held.deployment
            )

    async def _take(self, domain: str, tenant: Tenant, undo: contextlib.AsyncExitStack) -> None:
        if reserved(domain, self._own):
            raise DomainReserved(domain)
        claim = self._claims.get(domain)
        if claim is not None and claim.deployment:
            raise _owned(domain)
        self._moving.add(domain)  # from now on no deployment can hold it
        undo.callback(self._moving.discard, domain)
        carriers = carriers_of(await self._tenants.list()).get(domain, ())
        if await self._decisions.decide(domain, carriers) not in (None, tenant.name):
            raise _owned(domain)
        undo.push_async_callback(self._claims.keep, domain, self._claims.get(domain))
        if not await self._claims.keep(domain, Claim(tenant.name, tenant.instance or "")):
            raise _owned(domain)

    async def left(self, name: str) -> list[str]:
        """Release the domains of a destroyed tenant, and return those that are free now.

        Call it while `deciding` is held.
        """
        free = []
        for domain, claim in self._claims.items():
            if claim.tenant == name and not claim.deployment and await self._decisions.is_over(domain, claim):
                await self._claims.keep(domain, None)
                if not self.holder(domain):
                    free.append(domain)
        return free

    # --- the owner ----------------------------------------------------------------------------------

    def serves(self, domain: str, tenant: str) -> bool:
        """Return whether a domain is this tenant's, so that its route may lead there."""
        return self._decisions.serves(domain, tenant)

    def held(self) -> set[str]:
        """Return the domains that deployments hold; those deployments set their routes."""
        return {domain for domain, claim in self._claims.items() if claim.deployment}

    async def owner(self, domain: str) -> str | None:
        """Return the current name of the tenant that has a domain and carries it."""
        name = plain(domain)
        claim = None if name is None else self._claims.get(name)
        if name is None:
            return None
        if claim is None or (not claim.deployment and await self._decisions.is_over(name, claim)):
            async with self._deciding:  # not seen yet, renamed by an operator, or gone
                return await self._decisions.decide(
                    name, carriers_of(await self._tenants.list()).get(name, ())
                )
        return claim.tenant

    @property
    def elsewhere(self) -> Mapping[str, str] | None:
        """The members of the cluster that have the other domains; None if that is not known yet."""
        return self._claims.elsewhere

    async def agree(self) -> None:
        """Correct this member's reservations of the cluster's domains. Raises `Unavailable`."""
        await self._claims.agree()

    async def look(self, sites: Sequence[Site], serving: Collection[str], alive: Collection[str]) -> None:
        """Decide which tenant has each domain, and report contested ones.

        `serving` are tenants that their domain is routed to now, `alive` the deployments that have not ended.
        Call it while `deciding` is held, with a list made since.
        """
        await self.retain(alive)
        await self._claims.store_again()
        carried = carriers_of(sites)
        for domain in dict.fromkeys([*(domain for domain, _ in self._claims.items()), *carried]):
            try:
                await self._decisions.decide(domain, carried.get(domain, ()), serving)
            except Unavailable as error:  # the cluster decides about none of the others either
                log.warning("cannot decide yet who owns %s: %s", domain, error.message)
                break
        sharing = frozenset(site.tenant for site in sites if site.shares_address)
        self._contests.tell(self._decisions.contested(carried), sharing)


def _owned(domain: str) -> Conflict:
    return Conflict(
        f"{domain} is another tenant's; name that one with `tenant` to update its site, or choose another "
        "domain",
        reason="domain_owned",
    )
