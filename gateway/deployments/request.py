"""What is asked for when a site is deployed, and the checks that need nothing but the request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from gateway.deployments.manifest import Overrides
from gateway.errors import InvalidParams
from gateway.runtime.sites import FORMER_ID

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENV_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Rollback:
    """Bring back a site that a tenant keeps: that of a deployment, or the one that was live last."""

    to: str | None = None

    def __post_init__(self) -> None:
        if self.to is not None and not FORMER_ID.fullmatch(self.to):
            raise InvalidParams(f"{self.to[:40]!r} is no id of a deployment", field="to")


@dataclass(frozen=True, slots=True)
class Variables:
    """Change a site's environment: each name with its new value, None for one that goes."""

    changes: Mapping[str, str | None] = field(repr=False)

    def __post_init__(self) -> None:
        check_env({name: value or "" for name, value in self.changes.items()})
        if not self.changes:
            raise InvalidParams("env names no variable", field="env")


Change = Rollback | Variables
"""A deployment that brings no files of its own: of a tenant that is there, by its name."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for; `template` is a name, an archive or a change.

    `env` is kept nowhere but in the tenant. To make one of a large archive, whose digest is taken, takes a
    moment: do it off the loop.
    """

    domain: str
    template: str | bytes | Change
    size: str = "small"
    env: Mapping[str, str] | None = None
    tenant: str | None = None
    overrides: Overrides | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        template: Any
        match self.template:
            case bytes():
                template = hashlib.sha256(self.template).hexdigest()
            case Rollback(to):
                template = ["rollback", to]
            case Variables(changes):
                template = ["environment", sorted(changes.items())]
            case _:
                template = self.template
        env = None if self.env is None else sorted(self.env.items())
        said = None if self.overrides is None else self.overrides.said
        facts = [self.domain, template, self.size, env, self.tenant, said]
        object.__setattr__(self, "digest", hashlib.sha256(orjson.dumps(facts)).hexdigest())


def check_env(env: Mapping[str, str] | None) -> None:
    """Raise `InvalidParams` for what cannot be an environment, or is too large."""
    if env is None:
        return
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise InvalidParams(f"{name[:60]!r} is no environment variable", field="env")
    if sum(len(name) + len(value) for name, value in env.items()) > _ENV_MAX:
        raise InvalidParams(f"env has over {_ENV_MAX} characters", field="env")
