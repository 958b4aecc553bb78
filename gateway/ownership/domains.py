"""Decides which tenant has each domain: the one authority for giving, taking and routing a domain.

Incus says which tenants carry a domain (`user.gateway.domain`), and that may be several: an operator copies
an instance, or writes the key by hand. The claims say which of them has it, by the id of its instance, so
that a restart or a rename changes nothing. A deployment holds its domain from before it is recorded until it
is over.

A domain that two tenants carry is contested: the one that has it keeps it until it gives it up, and both are
told. No other module compares domains.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.auth.tokens import Token
from gateway.errors import Conflict, Forbidden, GatewayError, NotFound
from gateway.events import Bus
from gateway.hostnames import DomainReserved, matches, own_names, plain, reserved
from gateway.ownership.claims import Claim, Claims
from gateway.ownership.contests import Carrier, Contest, Contests, carriers_of
from gateway.runtime import Tenant, TenantRuntime
from gateway.runtime.sites import Site
from gateway.settings import Settings
from gateway.storage.store import Store


class Domains:
    """The domains of one gateway. Make it by `opened`; used from the event loop only."""

    def __init__(self, runtime: TenantRuntime, claims: Claims, bus: Bus, settings: Settings) -> None:
        self._runtime, self._settings, self._claims = runtime, settings, claims
        self._own = own_names(settings)
        self._contests = Contests(bus)
        self._moving: set[str] = set()  # domains that a tenant is just being given
        self._deciding = asyncio.Lock()

    @classmethod
    async def opened(cls, runtime: TenantRuntime, store: Store, bus: Bus, settings: Settings) -> Domains:
        """Go on with the claims of the last process, and what its deployments hold. Raises `StoreFailed`."""
        return cls(runtime, await Claims.opened(store), bus, settings)

    @property
    def contested(self) -> int:
        """How many domains are carried by several tenants, or are the gateway's own and carried by one."""
        return self._contests.domains

    @property
    def shared(self) -> int:
        """How many tenants with a domain share their address with another instance."""
        return self._contests.addresses

    # --- permission ---------------------------------------------------------------------------------

    async def permit(self, token: Token, domain: str) -> None:
        """Return if a token may give its tenants this domain. Raises `DomainReserved` and `Forbidden`.

        Looks at no tenants but the token's own, so that the answer does not say whose the domain is.
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
        for tenant in await self._runtime.list():
            if token.covers(tenant.name) and plain(tenant.domain) == domain:
                return
        raise Forbidden(
            f"this token may not give a tenant the domain {domain}; ask whoever runs the gateway for one "
            f"that may: incus-gateway token --domain {domain}",
            reason="domain_not_allowed",
            domain=domain,
        )

    # --- deployments --------------------------------------------------------------------------------

    async def hold(self, domain: str, tenant: str, deployment: str) -> bool:
        """Hold a domain for a tenant until the deployment is over; say whether that was possible.

        It is not if the domain is another tenant's: `confirm` says so when it is the deployment's turn.
        Raises `DomainReserved`, and `Conflict` if another deployment holds it.
        """
        if reserved(domain, self._own):
            raise DomainReserved(domain)
        claim = self._claims.get(domain)
        if claim is not None and claim.tenant != tenant and not claim.deployment:
            if domain in self._moving or not await self._is_over(domain, claim):
                return False
            if self._claims.get(domain) == claim:
                self._claims.forget(domain)
            claim = self._claims.get(domain)
        if claim is not None and claim.deployment:
            raise Conflict(f"a deployment of {domain} runs already; wait for it", reason="domain_owned")
        if claim is not None and claim.tenant != tenant:
            return False
        await self._claims.keep(domain, replace(claim or Claim(tenant), deployment=deployment))
        return True

    def holder(self, domain: str) -> str:
        """Return the deployment that holds a domain, "" for none."""
        claim = self._claims.get(domain)
        return "" if claim is None else claim.deployment

    async def confirm(self, domain: str, tenant: str, deployment: str, tenants: Sequence[Tenant]) -> None:
        """Confirm what a deployment holds; `tenants` is a list of all tenants made just now.

        Call it while `deciding` is held. Raises `Conflict` if the domain is another tenant's.
        """
        owner = await self._decide(domain, carriers_of(tenants).get(domain, ()))
        claim = self._claims.get(domain)
        if owner not in (None, tenant) or (claim is not None and claim.deployment not in ("", deployment)):
            raise _owned(domain)
        await self._claims.keep(
            domain, replace(claim or Claim(tenant), tenant=tenant, deployment=deployment, confirmed=True)
        )

    async def over(self, deployment: str) -> None:
        """Release what a deployment held; a tenant that was seen to carry the domain keeps it."""
        for domain, claim in self._claims.items():
            if claim.deployment == deployment:
                await self._settle(domain, claim)

    async def retain(self, deployments: Collection[str]) -> None:
        """Release what any other deployment holds: an earlier process was killed before it could do so."""
        for domain, claim in self._claims.items():
            if claim.deployment and claim.deployment not in deployments:
                kept = replace(claim, deployment="", confirmed=False)
                await self._claims.keep(domain, kept if kept.instance else None)

    async def _settle(self, domain: str, claim: Claim) -> None:
        instance = claim.instance
        if claim.confirmed:  # else nothing was done yet
            try:
                tenant = await self._runtime.get(claim.tenant)
                instance = (tenant.instance or "") if plain(tenant.domain) == domain else ""
            except NotFound:
                instance = ""
            except GatewayError:
                pass  # the next look at all tenants finds out
        if self._claims.get(domain) is claim:
            await self._claims.keep(domain, Claim(claim.tenant, instance) if instance else None)

    # --- a tenant gets another domain ---------------------------------------------------------------

    def deciding(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """Keep others from deciding about domains, while you look up what all tenants carry."""
        return self._deciding

    @contextlib.asynccontextmanager
    async def moving(self, name: str, domain: str | None) -> AsyncIterator[str | None]:
        """Give a tenant a domain, or none. Tell Incus while the context is open.

        Yields the domain that it carried. Raises `NotFound`, and `Conflict` if another tenant has the new one
        or a deployment of this tenant runs.
        """
        async with self._deciding, contextlib.AsyncExitStack() as undo:
            tenant = await self._runtime.get(name)
            self.undisturbed(name)
            carried = carriers_of(await self._runtime.list())
            before = plain(tenant.domain)
            if before is not None:
                await self._decide(before, carried.get(before, ()))
            if domain is not None:
                await self._take(domain, tenant, undo)
            yield before
            undo.pop_all()
            self._moving.discard(domain or "")
            for other, claim in self._claims.items():
                if claim.tenant == name and other != domain and not claim.deployment:
                    await self._claims.keep(other, None)

    def undisturbed(self, name: str) -> None:
        """Return if no deployment of a tenant runs. Raises `Conflict`."""
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
        self._moving.add(domain)  # from now on no deployment comes to hold it
        undo.callback(self._moving.discard, domain)
        carriers = carriers_of(await self._runtime.list()).get(domain, ())
        if await self._decide(domain, carriers) not in (None, tenant.name):
            raise _owned(domain)
        undo.push_async_callback(self._claims.keep, domain, self._claims.get(domain))
        await self._claims.keep(domain, Claim(tenant.name, tenant.instance or ""))

    async def left(self, name: str) -> list[str]:
        """Release the domains of a tenant that was just destroyed, and return those that are free now.

        Call it while `deciding` is held.
        """
        free = []
        for domain, claim in self._claims.items():
            if claim.tenant == name and not claim.deployment and await self._is_over(domain, claim):
                await self._claims.keep(domain, None)
                if not self.holder(domain):
                    free.append(domain)
        return free

    # --- the owner ----------------------------------------------------------------------------------

    def serves(self, domain: str, tenant: str) -> bool:
        """Say whether a domain is this tenant's, so that its route may lead there."""
        claim = self._claims.get(domain)
        return claim is not None and claim.tenant == tenant and not reserved(domain, self._own)

    def held(self) -> set[str]:
        """Return the domains that deployments hold; those deployments set their routes."""
        return {domain for domain, claim in self._claims.items() if claim.deployment}

    async def owner(self, domain: str) -> str | None:
        """Return the present name of the tenant that has a domain and carries it."""
        name = plain(domain)
        claim = None if name is None else self._claims.get(name)
        if name is None:
            return None
        if claim is None or (not claim.deployment and await self._is_over(name, claim)):
            async with self._deciding:  # not seen yet, renamed by an operator, or gone
                return await self._decide(name, carriers_of(await self._runtime.list()).get(name, ()))
        return claim.tenant

    async def look(self, sites: Sequence[Site], serving: Collection[str], alive: Collection[str]) -> None:
        """Decide which tenant has each domain, and report what is contested.

        `serving` are tenants that their domain leads to now, and `alive` the deployments that are not over.
        Call it while `deciding` is held, with a list made since.
        """
        await self.retain(alive)
        await self._claims.store_again()
        carried = carriers_of(sites)
        for domain in {*carried, *(domain for domain, _ in self._claims.items())}:
            await self._decide(domain, carried.get(domain, ()), serving)
        sharing = frozenset(site.tenant for site in sites if site.shares_address)
        self._contests.tell(self._contested(carried), sharing)

    async def _decide(
        self, domain: str, carriers: Sequence[Carrier], serving: Collection[str] = ()
    ) -> str | None:
        """Decide and keep which of its carriers has a domain; return that tenant, or None."""
        if reserved(domain, self._own):
            return None
        claim = self._claims.get(domain)
        if claim is not None and claim.confirmed:
            return claim.tenant
        if claim is not None:
            same = (
                carrier
                for carrier in carriers
                if (carrier.instance == claim.instance if claim.instance else carrier.tenant == claim.tenant)
            )
            found = next(same, None)
            if found is None and any(one.deployment == claim.deployment != "" for one in carriers):
                return claim.tenant  # the deployment made it under another name, and renames it next
            if found is not None:
                await self._claims.keep(domain, replace(claim, tenant=found.tenant, instance=found.instance))
                return found.tenant
            # a list leaves out an instance that is just being changed
            if not claim.deployment and not await self._is_over(domain, claim):
                return claim.tenant
            claim = self._claims.get(domain)  # a deployment may hold it by now
        if carriers:
            first = min(carriers, key=lambda one: (one.tenant not in serving, one.created, one.tenant))
            deployment = claim.deployment if claim is not None and claim.tenant == first.tenant else ""
            await self._claims.keep(domain, Claim(first.tenant, first.instance, deployment))
            return first.tenant
        if claim is not None and claim.deployment:
            return claim.tenant
        await self._claims.keep(domain, None)
        return None

    async def _is_over(self, domain: str, claim: Claim) -> bool:
        """Say whether the tenant of a claim carries the domain no longer; False if that is not known."""
        try:
            tenant = await self._runtime.get(claim.tenant)
        except NotFound:
            return True
        except GatewayError:
            return False
        return plain(tenant.domain) != domain or claim.instance not in ("", tenant.instance or "")

    def _contested(self, carried: Mapping[str, Sequence[Carrier]]) -> dict[tuple[str, str], Contest]:
        found = {}
        for domain, carriers in carried.items():
            for carrier in carriers:
                keeps = self.serves(domain, carrier.tenant)
                if (len(carriers) > 1 or not keeps) and not self._makes(domain, carrier):
                    found[domain, carrier.tenant] = Contest(keeps, reserved(domain, self._own))
        return found

    def _makes(self, domain: str, carrier: Carrier) -> bool:
        """Say whether the deployment that holds the domain is making this carrier."""
        claim = self._claims.get(domain)
        return claim is not None and carrier.deployment == claim.deployment != ""


def _owned(domain: str) -> Conflict:
    return Conflict(
        f"{domain} is another tenant's; name that one by `tenant` to update its site, or choose another "
        "domain",
        reason="domain_owned",
    )
