"""Decides which of the tenants that carry a domain has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from gateway.errors import GatewayError, NotFound
from gateway.hostnames import plain, reserved
from gateway.ownership.claims import Claim, Claims
from gateway.ownership.contests import Carrier, Contest
from gateway.runtime import Tenants


class Decisions:
    """The owner of each domain, by claims and by what tenants carry. `own` are the gateway's own names."""

    def __init__(self, tenants: Tenants, claims: Claims, own: Collection[str]) -> None:
        self._tenants, self._claims, self._own = tenants, claims, own

    def serves(self, domain: str, tenant: str) -> bool:
        """Return whether a domain is this tenant's."""
        claim = self._claims.get(domain)
        return claim is not None and claim.tenant == tenant and not reserved(domain, self._own)

    async def decide(
        self, domain: str, carriers: Sequence[Carrier], serving: Collection[str] = ()
    ) -> str | None:
        """Decide which of its carriers has a domain, and store that; return the tenant, or None.

        None of them has it if a tenant of another member of the cluster does. Raises `Unavailable` if the
        cluster cannot decide.
        """
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
                return claim.tenant  # the deployment created it under another name, and renames it next
            if found is not None:
                kept = replace(claim, tenant=found.tenant, instance=found.instance)
                return found.tenant if await self._claims.keep(domain, kept) else None
            # a list omits an instance that is being changed
            if not claim.deployment and not await self.is_over(domain, claim):
                return claim.tenant
            claim = self._claims.get(domain)  # a deployment may hold it by now
        if carriers:
            first = min(carriers, key=lambda one: (one.tenant not in serving, one.created, one.tenant))
            deployment = claim.deployment if claim is not None and claim.tenant == first.tenant else ""
            kept = Claim(first.tenant, first.instance, deployment)
            return first.tenant if await self._claims.keep(domain, kept) else None
        if claim is not None and claim.deployment:
            return claim.tenant
        await self._claims.keep(domain, None)
        return None

    async def is_over(self, domain: str, claim: Claim) -> bool:
        """Return whether the tenant of a claim no longer carries the domain; False if that is unknown."""
        try:
            tenant = await self._tenants.get(claim.tenant)
        except NotFound:
            return True
        except GatewayError:
            return False
        return plain(tenant.domain) != domain or claim.instance not in ("", tenant.instance or "")

    def contested(self, carried: Mapping[str, Sequence[Carrier]]) -> dict[tuple[str, str], Contest]:
        """Return the carriers of domains that several tenants carry, or that are not theirs."""
        found = {}
        for domain, carriers in carried.items():
            for carrier in carriers:
                keeps = self.serves(domain, carrier.tenant)
                if (len(carriers) > 1 or not keeps) and not self._makes(domain, carrier):
                    found[domain, carrier.tenant] = Contest(keeps, reserved(domain, self._own))
        return found

    def _makes(self, domain: str, carrier: Carrier) -> bool:
        """Return whether the deployment that holds the domain is making this carrier."""
        claim = self._claims.get(domain)
        return claim is not None and carrier.deployment == claim.deployment != ""
