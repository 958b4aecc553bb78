"""Requests for deployments, and the checks that need nothing else."""

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
    """Go back to a former site that the tenant keeps: a given deployment's, or the one live before."""

    to: str | None = None

    def __post_init__(self) -> None:
        if self.to is not None and not FORMER_ID.fullmatch(self.to):
            raise InvalidParams(f"{self.to[:40]!r} is not the id of a deployment", field="to")


@dataclass(frozen=True, slots=True)
class Variables:
    """Change a site's environment: each name with its new value, None to remove it."""

    changes: Mapping[str, str | None] = field(repr=False)

    def __post_init__(self) -> None:
        check_env({name: value or "" for name, value in self.changes.items()})
        if not self.changes:
            raise InvalidParams("env names no variable", field="env")


Change = Rollback | Variables
"""A deployment without new files, for an existing tenant."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request; `template` is a name, an archive or a change.

    `env` is stored only in the tenant. With `clean`, an update removes what the site wrote, too, unless the
    folder says that it stays. The constructor computes the archive's digest, which takes a moment
    for a large one: call it off the event loop.
    """

    domain: str
    template: str | bytes | Change
    size: str = "small"
    env: Mapping[str, str] | None = None
    tenant: str | None = None
    overrides: Overrides | None = None
    clean: bool = False
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
        facts = [self.domain, template, self.size, env, self.tenant, said, self.clean]
        object.__setattr__(self, "digest", hashlib.sha256(orjson.dumps(facts)).hexdigest())


def check_env(env: Mapping[str, str] | None) -> None:
    """Raise `InvalidParams` for an invalid environment, or one that is too large."""
    if env is None:
        return
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise InvalidParams(f"{name[:60]!r} is not a valid name of an environment variable", field="env")
    if sum(len(name) + len(value) for name, value in env.items()) > _ENV_MAX:
        raise InvalidParams(f"env is longer than {_ENV_MAX} characters", field="env")
