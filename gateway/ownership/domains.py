"""Domain ownership: the one authority for giving a domain, taking it and routing it.

Incus says which tenants carry a domain (`user.gateway.domain`), and more than one may: an operator copies an
instance, or writes the key by hand. Which of them has it is kept here, with the instance's own id, so that it
survives a restart and a rename. A deployment holds its domain from before it is on record until it is over.

A domain that two carry is contested: it stays with who has it until that one lets go of it, and each of them
is told. Nobody else compares domains.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gateway.auth.tokens import Token
from gateway.errors import Conflict, Forbidden, GatewayError, NotFound
from gateway.events import Bus
from gateway.hostnames import DomainReserved, matches, own_names, plain, reserved
from gateway.runtime import Tenant, TenantRuntime
from gateway.runtime.sites import Site
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """Who has a domain.

    `instance` tells its tenant from any other of that name, "" until that has been seen. `deployment` is one
    that is not over and holds the domain, "" for none; `confirmed` once Incus was asked on its behalf.
    """

    tenant: str
    instance: str = ""
    deployment: str = ""
    confirmed: bool = False


@dataclass(frozen=True, slots=True)
class _Carrier:
    """A tenant that carries a domain in Incus."""

    tenant: str
    instance: str
    created: str
    deployment: str


class Domains:
    """The domains of one gateway. Make it by `opened`; used from the event loop only."""

    def __init__(self, runtime: TenantRuntime, store: Store, bus: Bus, settings: Settings) -> None:
        self._runtime, self._store, self._bus, self._settings = runtime, store, bus, settings
        self._own = own_names(settings)
        self._claims: dict[str, Claim] = {}
        self._unwritten: set[str] = set()  # domains of which the store tells otherwise
        self._moving: set[str] = set()  # domains that a tenant is just being given
        self._told: dict[tuple[str, str], bool] = {}  # contested: whether this tenant has this domain
        self._sharing: frozenset[str] = frozenset()  # tenants that have one address with another instance
        self._deciding = asyncio.Lock()

    @classmethod
    async def opened(cls, runtime: TenantRuntime, store: Store, bus: Bus, settings: Settings) -> Domains:
        """Take over what the last life knew, the holds of its deployments too."""
        self = cls(runtime, store, bus, settings)
        for domain, tenant, instance, deployment in await store.read(_all):
            self._claims[domain] = Claim(tenant, instance, deployment)
        return self

    @property
    def contested(self) -> int:
        """How many domains more than one tenant carries, or one that are the gateway's own."""
        return len({domain for domain, _ in self._told})

    @property
    def shared(self) -> int:
        """How many tenants with a domain have their address with another instance."""
        return len(self._sharing)

    # --- who may ------------------------------------------------------------------------------------

    async def permit(self, token: Token, domain: str) -> None:
        """Return if a token may give its tenants this domain. Raises `DomainReserved` and `Forbidden`.

        It says nothing of whose the domain is, and looks at nothing but the token's own tenants.
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
        """Keep a domain for a tenant until the deployment is over; say whether it could be kept.

        It cannot where it is another tenant's: `confirm` says so once it is that deployment's turn. Raises
        `DomainReserved`, and `Conflict` where another deployment holds it.
        """
        if reserved(domain, self._own):
            raise DomainReserved(domain)
        claim = self._claims.get(domain)
        if claim is not None and claim.tenant != tenant and not claim.deployment:
            if domain in self._moving or not await self._is_over(domain, claim):
                return False
            if self._claims.get(domain) == claim:
                del self._claims[domain]
            claim = self._claims.get(domain)
        if claim is not None and claim.deployment:
            raise Conflict(f"a deployment of {domain} runs already; wait for it", reason="domain_owned")
        if claim is not None and claim.tenant != tenant:
            return False
        await self._keep(domain, replace(claim or Claim(tenant), deployment=deployment))
        return True

    def holder(self, domain: str) -> str:
        """Return the deployment that holds a domain, "" for none."""
        claim = self._claims.get(domain)
        return "" if claim is None else claim.deployment

    async def confirm(self, domain: str, tenant: str, deployment: str, tenants: Sequence[Tenant]) -> None:
        """Make sure of what a deployment holds, by a look at all tenants of just now.

        Call it while `deciding` is held. Raises `Conflict` where the domain is another tenant's.
        """
        owner = await self._decide(domain, _carriers(tenants).get(domain, ()))
        claim = self._claims.get(domain)
        if owner not in (None, tenant) or (claim is not None and claim.deployment not in ("", deployment)):
            raise _owned(domain)
        await self._keep(
            domain, replace(claim or Claim(tenant), tenant=tenant, deployment=deployment, confirmed=True)
        )

    async def over(self, deployment: str) -> None:
        """Let go of what a deployment held; a tenant that was seen to have the domain keeps it."""
        for domain, claim in list(self._claims.items()):
            if claim.deployment == deployment:
                await self._settle(domain, claim)

    async def retain(self, deployments: Collection[str]) -> None:
        """Let go of what is held for any other deployment: an earlier life could not say that it was over."""
        for domain, claim in list(self._claims.items()):
            if claim.deployment and claim.deployment not in deployments:
                kept = replace(claim, deployment="", confirmed=False)
                await self._keep(domain, kept if kept.instance else None)

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
            await self._keep(domain, Claim(claim.tenant, instance) if instance else None)

    # --- a tenant gets another domain ---------------------------------------------------------------

    def deciding(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """Keep others from deciding whose a domain is, while what all tenants carry is looked up."""
        return self._deciding

    @contextlib.asynccontextmanager
    async def moving(self, name: str, domain: str | None) -> AsyncIterator[str | None]:
        """Give a tenant a domain, or none, while the context is open in which Incus is told.

        Yields the domain that it carried. Raises `NotFound`, and `Conflict` where the new one is another's
        or a deployment of the tenant runs.
        """
        async with self._deciding, contextlib.AsyncExitStack() as undo:
            tenant = await self._runtime.get(name)
            self.undisturbed(name)
            carried = _carriers(await self._runtime.list())
            before = plain(tenant.domain)
            if before is not None:
                await self._decide(before, carried.get(before, ()))
            if domain is not None:
                await self._take(domain, tenant, undo)
            yield before
            undo.pop_all()
            self._moving.discard(domain or "")
            for other, claim in list(self._claims.items()):
                if claim.tenant == name and other != domain and not claim.deployment:
                    await self._keep(other, None)

    def undisturbed(self, name: str) -> None:
        """Return where no deployment of a tenant runs. Raises `Conflict`."""
        held = next((one for one in self._claims.values() if one.tenant == name and one.deployment), None)
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
        carriers = _carriers(await self._runtime.list()).get(domain, ())
        if await self._decide(domain, carriers) not in (None, tenant.name):
            raise _owned(domain)
        undo.push_async_callback(self._keep, domain, self._claims.get(domain))
        await self._keep(domain, Claim(tenant.name, tenant.instance or ""))

    async def left(self, name: str) -> list[str]:
        """Return the domains of a tenant that was just destroyed: they are nobody's from now on.

        Call it while `deciding` is held.
        """
        free = []
        for domain, claim in list(self._claims.items()):
            if claim.tenant == name and not claim.deployment and await self._is_over(domain, claim):
                await self._keep(domain, None)
                if not self.holder(domain):
                    free.append(domain)
        return free

    # --- who has it ---------------------------------------------------------------------------------

    def serves(self, domain: str, tenant: str) -> bool:
        """Say whether a domain is this tenant's, so that it may lead there."""
        claim = self._claims.get(domain)
        return claim is not None and claim.tenant == tenant and not reserved(domain, self._own)

    def held(self) -> set[str]:
        """Return the domains that deployments hold, whose routes are those deployments' affair."""
        return {domain for domain, claim in self._claims.items() if claim.deployment}

    async def owner(self, domain: str) -> str | None:
        """Return the tenant that has a domain and carries it, by whatever name it goes now."""
        name = plain(domain)
        claim = None if name is None else self._claims.get(name)
        if name is None:
            return None
        if claim is None or (not claim.deployment and await self._is_over(name, claim)):
            async with self._deciding:  # not looked at yet, renamed by an operator, or gone
                return await self._decide(name, _carriers(await self._runtime.list()).get(name, ()))
        return claim.tenant

    async def look(self, sites: Sequence[Site], serving: Collection[str], alive: Collection[str]) -> None:
        """Decide for every domain that a tenant carries whose it is, and tell what is contested.

        `serving` are tenants to which their domain leads now, and `alive` the deployments that are not over.
        Call it while `deciding` is held, with what was listed since.
        """
        await self.retain(alive)
        for domain in list(self._unwritten):
            await self._write(domain)
        carried = _carriers(sites)
        for domain in {*carried, *self._claims}:
            await self._decide(domain, carried.get(domain, ()), serving)
        self._tell(carried, frozenset(site.tenant for site in sites if site.shares_address))

    async def _decide(
        self, domain: str, carriers: Sequence[_Carrier], serving: Collection[str] = ()
    ) -> str | None:
        """Return whose a domain is, by who carries it now, and keep that; None for nobody's."""
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
                return claim.tenant  # made under another name, which it gets rid of next
            if found is not None:
                await self._keep(domain, replace(claim, tenant=found.tenant, instance=found.instance))
                return found.tenant
            # a list leaves out one that is just being changed
            if not claim.deployment and not await self._is_over(domain, claim):
                return claim.tenant
            claim = self._claims.get(domain)  # a deployment may hold it by now
        if carriers:
            first = min(carriers, key=lambda one: (one.tenant not in serving, one.created, one.tenant))
            deployment = claim.deployment if claim is not None and claim.tenant == first.tenant else ""
            await self._keep(domain, Claim(first.tenant, first.instance, deployment))
            return first.tenant
        if claim is not None and claim.deployment:
            return claim.tenant
        await self._keep(domain, None)
        return None

    async def _is_over(self, domain: str, claim: Claim) -> bool:
        """Say whether who had a domain carries it no longer; not where that cannot be known."""
        try:
            tenant = await self._runtime.get(claim.tenant)
        except NotFound:
            return True
        except GatewayError:
            return False
        return plain(tenant.domain) != domain or claim.instance not in ("", tenant.instance or "")

    async def _keep(self, domain: str, claim: Claim | None) -> None:
        before = self._claims.get(domain)
        if claim == before:
            return
        if claim is None:
            del self._claims[domain]
        else:
            self._claims[domain] = claim
        await self._write(domain)

    async def _write(self, domain: str) -> None:
        self._unwritten.discard(domain)
        try:
            await self._store.write(partial(_write, domain=domain, claim=self._claims.get(domain)))
        except StoreFailed as failed:  # for this life it is known; there may be room at the next look
            log.warning("whose %s is cannot be written down: %s", domain, failed.message)
            self._unwritten.add(domain)

    # --- what is contested --------------------------------------------------------------------------

    def _tell(self, carried: dict[str, list[_Carrier]], sharing: frozenset[str]) -> None:
        """Tell each tenant of its own contests, once; whose else a domain is it does not hear."""
        contested = {
            (domain, carrier.tenant): self.serves(domain, carrier.tenant)
            for domain, carriers in carried.items()
            for carrier in carriers
            if len(carriers) > 1 or not self.serves(domain, carrier.tenant)
            if not self._makes(domain, carrier)
        }
        for (domain, tenant), serves in contested.items():
            if self._told.get((domain, tenant)) is not serves:
                log.warning(
                    "%s is contested; %s %s it", domain, tenant, "keeps" if serves else "is not given"
                )
                reason = "reserved" if reserved(domain, self._own) else "owned"
                facts = {"domain": domain, "keeps": serves, "reason": reason}
                self._bus.publish("tenant.domain.contested", tenant, facts)
        self._told = contested
        for tenant in sorted(sharing - self._sharing):
            log.warning("%s has one address with another instance", tenant)
            self._bus.publish("tenant.address.contested", tenant, {})
        self._sharing = sharing

    def _makes(self, domain: str, carrier: _Carrier) -> bool:
        """Say whether a carrier is what the deployment that holds the domain is just making."""
        claim = self._claims.get(domain)
        return claim is not None and carrier.deployment == claim.deployment != ""


def _carriers(found: Iterable[Tenant | Site]) -> dict[str, list[_Carrier]]:
    carried: dict[str, list[_Carrier]] = defaultdict(list)
    for one in found:
        domain = plain(one.domain)
        if domain is not None:
            tenant = one.tenant if isinstance(one, Site) else one.name
            carried[domain].append(
                _Carrier(tenant, one.instance or "", one.created or "", one.deployment or "")
            )
    return carried


def _owned(domain: str) -> Conflict:
    return Conflict(
        f"{domain} is another tenant's; a deployment that names that one by `tenant` updates its site, else "
        "choose another domain",
        reason="domain_owned",
    )


# --- statements: each is a work of the store -----------------------------------------------------------


def _all(connection: sqlite3.Connection) -> Sequence[tuple[str, str, str, str]]:
    return connection.execute("SELECT domain, tenant, instance, deployment FROM domains").fetchall()


def _write(connection: sqlite3.Connection, domain: str, claim: Claim | None) -> None:
    if claim is None:
        connection.execute("DELETE FROM domains WHERE domain = ?", (domain,))
    else:
        connection.execute(
            "INSERT OR REPLACE INTO domains VALUES (?, ?, ?, ?)",
            (domain, claim.tenant, claim.instance, claim.deployment),
        )
