"""What is asked for when a site is deployed, and the checks that need nothing but the request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import orjson

from gateway.errors import InvalidParams

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENV_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. `template` is a name or an archive; `env` is kept nowhere but in the tenant.

    To make one of a large archive, whose digest is taken, takes a moment: do it off the loop.
    """

    domain: str
    template: str | bytes
    size: str = "small"
    env: Mapping[str, str] | None = None
    tenant: str | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        template = (
            self.template if isinstance(self.template, str) else hashlib.sha256(self.template).hexdigest()
        )
        env = None if self.env is None else sorted(self.env.items())
        facts = [self.domain, template, self.size, env, self.tenant]
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
