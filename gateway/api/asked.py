"""What a request is about, by its head alone: so its home is known before its body is read."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs

from starlette.types import Scope

from gateway.auth.tokens import Token
from gateway.runtime import TENANT_NAME


@dataclass(frozen=True, slots=True)
class Asked:
    """A `tenant`, a `deployment`, whose home knows the tenant, or `events` of several tenants."""

    kind: str
    name: str

    @classmethod
    def of(cls, scope: Scope) -> Asked | None:
        """Return it, None for a request that any gateway answers."""
        match scope["path"].split("/", 4):
            case ["", "v1", "tenants", name, *_] if name:
                return cls("tenant", name)
            case ["", "v1", "deployments", name] if name:
                return cls("deployment", name)
            case ["", "v1", "events"]:
                names = parse_qs(scope["query_string"].decode("latin-1")).get("tenant", [""])
                return cls("tenant" if TENANT_NAME.fullmatch(names[-1]) else "events", names[-1])
        return None

    def by(self, token: Token) -> Asked:
        """Return it for this token: all events of one that covers one tenant are about that."""
        only = token.coverage
        if self.kind == "events" and not self.name and only is not None and len(only) == 1:
            return Asked("tenant", next(iter(only)))
        return self
