"""Stores which tenant has each domain, so that a restart changes nothing."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)


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
    """The claim of each domain, in memory and in the store. Make it by `opened`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._claims: dict[str, Claim] = {}
        self._unwritten: set[str] = set()  # domains whose claim could not be stored

    @classmethod
    async def opened(cls, store: Store) -> Claims:
        """Read the claims of an earlier process. Raises `StoreFailed`."""
        self = cls(store)
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

    async def keep(self, domain: str, claim: Claim | None) -> None:
        """Set or remove a domain's claim. A claim that cannot be stored is tried again by `store_again`."""
        before = self._claims.get(domain)
        if claim == before:
            return
        if claim is None:
            del self._claims[domain]
        else:
            self._claims[domain] = claim
        await self._write(domain)

    async def store_again(self) -> None:
        """Try again to store what could not be stored."""
        for domain in list(self._unwritten):
            await self._write(domain)

    async def _write(self, domain: str) -> None:
        self._unwritten.discard(domain)
        try:
            await self._store.write(partial(_write, domain=domain, claim=self._claims.get(domain)))
        except StoreFailed as failed:  # it stands in memory; there may be room later
            log.warning("the owner of %s cannot be stored: %s", domain, failed.message)
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
