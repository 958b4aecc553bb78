"""Merges the lists of tenants that the gateways of all members answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from gateway.api.http import address
from gateway.api.services import services
from gateway.auth.tokens import Token
from gateway.cluster.listener import FROM
from gateway.cluster.relay import ask_same, client_of
from gateway.lifecycle.lifecycle import described
from gateway.runtime import Tenant


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What the other members answered, and the names of those that did not; None without a cluster."""

    answers: list[Any] = field(default_factory=list)
    silent: list[str] | None = None

    def entries(self, key: str) -> Iterable[dict[str, Any]]:
        """Yield the entries of all their lists."""
        for answer in self.answers:
            yield from answer[key]

    @property
    def told(self) -> Mapping[str, Any]:
        """What the merged answer says about members that did not answer."""
        return {} if self.silent is None else {"unanswered": self.silent}


async def elsewhere(request: Request) -> Elsewhere:
    """Ask the other members the same question, unless one of them is asking."""
    cluster = services(request).cluster
    if cluster is None or FROM in request.scope:
        return Elsewhere()
    client = client_of(request.scope, address(request))
    return Elsewhere(*await ask_same(request.scope, cluster.peers, client))


def unheard(request: Request, token: Token, others: Elsewhere) -> Iterable[dict[str, Any]]:
    """Yield the tenants of members that did not answer or were removed, as far as the token covers them."""
    gateway = services(request)
    if gateway.standby is not None:
        for name in filter(token.covers, gateway.standby.lost):
            lost = Tenant(name, "error", location=gateway.standby.home(name))
            yield described(lost, gateway.settings) | {"reason": "member_away"}
    if gateway.cluster is None or others.silent is None:
        return
    for peer, known in gateway.cluster.homes.unheard(others.silent):
        if token.covers(known.name):
            tenant = Tenant(
                known.name,
                "error",
                domain=known.domain,
                created=known.created,
                location=peer.name,
                asleep=known.asleep,
            )
            more = {"status": known.status} if peer.alive else {"reason": "member_away"}
            yield described(tenant, gateway.settings) | more
