"""Finds out from a request's head, without its body, what the request is about and which member has that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from starlette.types import Scope

from gateway.api.access import check_covered
from gateway.api.services import Services
from gateway.auth.tokens import Token
from gateway.cluster.peers import Peer
from gateway.errors import NotFound
from gateway.runtime import TENANT_NAME, OnAnotherServer


@dataclass(frozen=True, slots=True)
class Asked:
    """A `tenant`, a `deployment`, whose home knows the tenant, or `events` of several tenants."""

    kind: str
    name: str

    @classmethod
    def of(cls, scope: Scope) -> Asked | None:
        """Return what a request asks for; None for a request that any gateway can answer."""
        match scope["path"].split("/", 4):
            case ["", "v1", "tenants", name, *_] if name:
                return cls("tenant", name)
            case ["", "v1", "deployments", name] if name:
                return cls("deployment", name)
            case ["", "v1", "events"]:
                query = parse_qs(scope["query_string"].decode("latin-1"))
                tenant, deployment = (query.get(name, [""])[-1] for name in ("tenant", "deployment"))
                if deployment and not tenant and "," not in deployment:
                    return cls("deployment", deployment)
                return cls("tenant" if TENANT_NAME.fullmatch(tenant) else "events", tenant)
        return None

    def by(self, token: Token) -> Asked:
        """Return what to look for: all events that a token of one tenant covers are that tenant's."""
        only = token.coverage
        if self.kind == "events" and not self.name and only is not None and len(only) == 1:
            return Asked("tenant", next(iter(only)))
        return self


async def home_of(services: Services, asked: Asked) -> Peer | None:
    """Return the peer that has what is asked for; None if that is here or nowhere, or there is no cluster."""
    cluster = services.cluster
    if cluster is None:
        return None
    if asked.kind == "tenant":
        peer, mine = cluster.homes.home(asked.name), services.names.holder(asked.name)
        if mine and (peer is None or await has(services, {"tenant": asked.name})):
            return None  # of two that say they have it, one has not noticed yet that it moved
        if peer is not None:
            return peer
    elif await has(services, {asked.kind: asked.name}):
        return None
    return await cluster.find(**{asked.kind: asked.name})


async def has(services: Services, what: Mapping[str, Any]) -> bool:
    """Say whether this gateway is the home of a tenant, or has the record of a deployment."""
    try:
        if "deployment" in what:
            await services.deployments.get(str(what["deployment"]))
        else:
            name, cluster = str(what["tenant"]), services.cluster
            moved = cluster is not None and cluster.homes.home(name) is not None
            if moved or not services.names.holder(name):
                check_covered(None, name)
                await services.runtime.tenants.get(name)
    except (NotFound, OnAnotherServer):
        return False
    return True
