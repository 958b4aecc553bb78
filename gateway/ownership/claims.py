"""Stores which tenant has each domain, so that a restart changes nothing.

In a cluster each gateway has the claims of its own member's tenants, and reserves their domains among all.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final
from weakref import WeakValueDictionary

from gateway.admission import Admission
from gateway.errors import Unavailable
from gateway.ownership.reservations import Holder, Reservations
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)

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
