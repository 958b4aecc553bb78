"""Reports domains that more than one tenant carries, and tenants that share their address."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway.events import Bus
from gateway.hostnames import plain
from gateway.runtime import Tenant
from gateway.runtime.sites import Site

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Carrier:
    """A tenant that carries a domain in Incus."""

    tenant: str
    instance: str
    created: str
    deployment: str


def carriers_of(found: Iterable[Tenant | Site]) -> dict[str, list[Carrier]]:
    """Return the carriers of each domain."""
    carried: dict[str, list[Carrier]] = defaultdict(list)
    for one in found:
        domain = plain(one.domain)
        if domain is not None:
            tenant = one.tenant if isinstance(one, Site) else one.name
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
