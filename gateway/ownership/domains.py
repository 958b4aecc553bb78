"""Reports domains that more than one tenant carries, and tenants that share their address.

Decides which of the tenants that carry a domain has it.

Stores which tenant has each domain, so that a restart changes nothing.

In a cluster each gateway has the claims of its own member's tenants, and reserves their domains among all.

Which tenant has each domain: the one authority for giving, taking and routing a domain.

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
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from weakref import WeakValueDictionary

from gateway.admission import Admission
from gateway.auth.tokens import Token
from gateway.errors import Conflict, Forbidden, GatewayError, NotFound, Unavailable
from gateway.events import Bus
from gateway.hostnames import DomainReserved, gateway_names, matches, plain, reserved
from gateway.ownership.reservations import Holder, Reservations
from gateway.runtime import TenantInstance, TenantInstances
from gateway.runtime.sites import TenantSite
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Carrier:
    """A tenant that carries a domain in Incus."""

    tenant: str
    instance: str
    created: str
    deployment: str


def carriers_of(found: Iterable[TenantInstance | TenantSite]) -> dict[str, list[Carrier]]:
    """Return the carriers of each domain."""
    carried: dict[str, list[Carrier]] = defaultdict(list)
    for one in found:
        domain = plain(one.domain)
        if domain is not None:
            tenant = one.tenant if isinstance(one, TenantSite) else one.name
            carried[domain].append(
                Carrier(tenant, one.instance or "", one.created or "", one.deployment or "")
            )
    return carried


@dataclass(frozen=True, slots=True)
class Contest:
    """A tenant's part in a contest: whether it keeps the domain, and whether that is the gateway's own."""

    keeps: bool
    reserved: bool


class Contests:
    """The contests that were reported to tenants: each change once, as an event and a log line.

    A tenant does not learn who else has the domain.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._told: dict[tuple[str, str], bool] = {}  # by domain and tenant: whether it keeps the domain
        self._sharing: frozenset[str] = frozenset()

    @property
    def domains(self) -> int:
        """Number of contested domains."""
        return len({domain for domain, _ in self._told})

    @property
    def addresses(self) -> int:
        """Number of tenants with a domain that share their address with another instance."""
        return len(self._sharing)

    def tell(self, contested: Mapping[tuple[str, str], Contest], sharing: frozenset[str]) -> None:
        """Report what has changed: contests by domain and tenant, and tenants that share their address."""
        for (domain, tenant), contest in contested.items():
            if self._told.get((domain, tenant)) is not contest.keeps:
                log.warning(
                    "%s is contested; %s %s it", domain, tenant, "keeps" if contest.keeps else "does not get"
                )
                reason = "reserved" if contest.reserved else "owned"
                facts = {"domain": domain, "keeps": contest.keeps, "reason": reason}
                self._bus.publish("tenant.domain.contested", tenant, facts)
        self._told = {key: contest.keeps for key, contest in contested.items()}
        for tenant in sorted(sharing - self._sharing):
            log.warning("%s shares its address with another instance", tenant)
            self._bus.publish("tenant.address.contested", tenant, {})
        self._sharing = sharing


class Decisions:
    """The owner of each domain, by claims and by what tenants carry. `own` are the gateway's own names."""

    def __init__(self, tenants: TenantInstances, claims: Claims, own: Collection[str]) -> None:
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


_AT_ONCE: Final = 5  # reservations that are put right


@dataclass(frozen=True, slots=True)
class Claim:
    """The tenant that has a domain.

    `instance` is the id of its instance, "" until that is known; another tenant of the same name has another.
    `deployment` is the one that holds the domain until it is over, "" for none; `confirmed` is set once Incus
    was asked on its behalf.
    """

    tenant: str
    instance: str = ""
    deployment: str = ""
    confirmed: bool = False


class Claims:
    """The claim of each domain, in memory and in the store. Create it with `opened`.

    `shared` has the domains of all members of a cluster; without one, there is no other gateway.
    """

    def __init__(self, store: Store, shared: Reservations | None = None) -> None:
        self._store, self._shared = store, shared
        self._claims: dict[str, Claim] = {}
        self._unwritten: set[str] = set()  # domains whose claim could not be stored
        self.elsewhere: Mapping[str, str] | None = None
        """The members that have the other domains of the cluster, as `agree` last found; None before."""
        # of each domain one reservation is changed at a time
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @classmethod
    async def opened(cls, store: Store, shared: Reservations | None = None) -> Claims:
        """Read the claims of an earlier process. Raises `StoreFailed`."""
        self = cls(store, shared)
        for domain, tenant, instance, deployment in await store.read(_all):
            self._claims[domain] = Claim(tenant, instance, deployment)
        return self

    def get(self, domain: str) -> Claim | None:
        return self._claims.get(domain)

    def items(self) -> list[tuple[str, Claim]]:
        return list(self._claims.items())

    def forget(self, domain: str) -> None:
        """Forget a claim in memory alone; `keep` follows."""
        del self._claims[domain]

    async def keep(self, domain: str, claim: Claim | None) -> bool:
        """Set or remove a domain's claim; return whether that was possible.

        It is not if another member of the cluster has the domain; then the earlier claim stands. A claim that
        cannot be stored is tried again by `store_again`. Raises `Unavailable` if the cluster cannot decide
        about a new one.
        """
        before = self._claims.get(domain)
        if claim == before:
            return True
        if claim is None:
            del self._claims[domain]
        else:
            self._claims[domain] = claim  # at once, so that nobody here takes it meanwhile
        if self._shared is not None and not await self._share(self._shared, domain, claim, before):
            return False
        await self._write(domain)
        return True

    async def _share(
        self, shared: Reservations, domain: str, claim: Claim | None, before: Claim | None
    ) -> bool:
        if claim is None:
            await self._leave(shared, domain)
            return True
        if before is not None and before.tenant == claim.tenant:
            return True
        taken = False
        try:
            async with self._turn(domain):
                taken = await shared.take(domain, claim.tenant, here=claim.instance != "")
        finally:
            if not taken and self._claims.get(domain) is claim:
                if before is None:
                    del self._claims[domain]
                else:
                    self._claims[domain] = before
        return taken

    async def _leave(self, shared: Reservations, domain: str) -> None:
        try:
            async with self._turn(domain):
                if domain not in self._claims:  # otherwise somebody has taken it again
                    await shared.leave(domain)
        except Unavailable as error:  # `agree` tries again
            log.warning("cannot release %s yet: %s", domain, error.message)

    async def agree(self) -> None:
        """Correct this member's reservations in the cluster, and give up claims that others hold there.

        They differ where the cluster could not decide for a while, where this server has just joined it, and
        where a tenant has moved here. Raises `Unavailable`.
        """
        shared = self._shared
        if shared is None:
            return
        held, few = await shared.held(), Admission[str]("reservations", each=1, total=_AT_ONCE)
        self.elsewhere = {
            domain: holder.member for domain, holder in held.items() if holder.member != shared.own
        }

        async def put_right(domain: str) -> None:
            async with few.slot(domain), self._turn(domain):
                claim = self._claims.get(domain)
                if claim is None:
                    await shared.leave(domain)
                    return
                # the claim is no proof that its tenant is still here; `keep` takes it anew for one that is
                taken = await shared.take(domain, claim.tenant)
                if not taken and self._claims.get(domain) == claim:
                    log.warning("%s is given up: another member of the cluster has it", domain)
                    del self._claims[domain]
                    await self._write(domain)

        wrong = {
            domain
            for domain, claim in self._claims.items()
            if held.get(domain) != Holder(shared.own, claim.tenant)
        }
        wrong |= {
            domain
            for domain, holder in held.items()
            if holder.member == shared.own and domain not in self._claims
        }
        await asyncio.gather(*(put_right(domain) for domain in wrong))

    def _turn(self, domain: str) -> asyncio.Lock:
        turn = self._turns.get(domain)
        if turn is None:
            turn = self._turns[domain] = asyncio.Lock()
        return turn

    async def store_again(self) -> None:
        """Try again to store what could not be stored."""
        for domain in list(self._unwritten):
            await self._write(domain)

    async def _write(self, domain: str) -> None:
        self._unwritten.discard(domain)
        try:
            await self._store.write(partial(_write, domain=domain, claim=self._claims.get(domain)))
        except StoreFailed as failed:  # it stands in memory; there may be room later
            log.warning("cannot store the owner of %s: %s", domain, failed.message)
            self._unwritten.add(domain)


# --- statements: the store runs them -------------------------------------------------------------------


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


class Domains:
    """The domains of one gateway. Create it with `opened`; used from the event loop only."""

    def __init__(self, tenants: TenantInstances, claims: Claims, bus: Bus, settings: Settings) -> None:
        self._tenants, self._settings, self._claims = tenants, settings, claims
        self._own = gateway_names(settings)
        self._decisions = Decisions(tenants, claims, self._own)
        self._contests = Contests(bus)
        self._moving: set[str] = set()  # domains that a tenant is being given
        self._deciding = asyncio.Lock()

    @classmethod
    async def opened(
        cls,
        tenants: TenantInstances,
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

    async def confirm(
        self, domain: str, tenant: str, deployment: str, tenants: Sequence[TenantInstance]
    ) -> None:
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

    async def _take(self, domain: str, tenant: TenantInstance, undo: contextlib.AsyncExitStack) -> None:
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

    async def look(
        self, sites: Sequence[TenantSite], serving: Collection[str], alive: Collection[str]
    ) -> None:
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
