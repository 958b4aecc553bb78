"""Requests for deployments, the HTTP bodies that make them, and the checks that need nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field

from gateway.auth.tokens import Token
from gateway.deployments.template import Install, Mode, Overrides, Port, Start
from gateway.errors import InvalidParams
from gateway.protocol import types
from gateway.runtime.sites import FORMER_ID

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENV_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class DeploymentOwner:
    """Whose share a deployment counts towards: the token's tenants or, if it covers all, its subject."""

    tenants: frozenset[str] | None
    subject: str

    @classmethod
    def of(cls, token: Token) -> DeploymentOwner:
        return cls(token.coverage, token.subject if token.coverage is None else "")


def uploader(token: Token, ended: Callable[[str], float]) -> str:
    """Return the owner of uploads under a token; kept copies of them are reused for the same owner only.

    This is narrower than `DeploymentOwner`: it always includes the subject, and somebody with a tenant's name
    that was another's before is a different owner.
    """
    names = None if token.coverage is None else [(name, ended(name)) for name in sorted(token.coverage)]
    return hashlib.sha256(orjson.dumps([token.subject, names])).hexdigest()[:32]


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
class DeploymentRequest:
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
        said = None if self.overrides is None else self.overrides.given
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


_VARIABLES: Final = 200  # of one request
SiteEnvironment = Annotated[dict[types.VariableName, types.SiteValue], Field(max_length=_VARIABLES)]


class Archive(BaseModel):
    """An uploaded template: a tar, gzipped or not, in base64."""

    model_config = ConfigDict(extra="forbid")

    archive: types.Archive


class DeployBody(BaseModel):
    """The body of `POST /v1/deployments`. `start`, `install` and `port` are for an archive."""

    model_config = ConfigDict(extra="forbid")

    domain: Annotated[types.DomainName, Field(min_length=1)]
    template: types.TemplateName | Archive
    size: types.SizeName = "small"
    env: SiteEnvironment | None = None
    tenant: Annotated[types.TenantName, Field(min_length=1)] | None = None
    start: Start | None = None
    install: Install | None = None
    port: Port | None = None
    mode: Mode | None = None
    clean: bool = False

    def request(self) -> DeploymentRequest:
        """Return the request. Raises `InvalidParams` for an archive that is not base64."""
        template: str | bytes
        overrides = Overrides(start=self.start, install=self.install, port=self.port, mode=self.mode)
        if isinstance(self.template, str):
            template = self.template
            if overrides.given:
                field = next(iter(overrides.given))
                raise InvalidParams(
                    f"{field} is only for an archive; a named template has its own", field=field
                )
        else:
            try:
                template = base64.b64decode(self.template.archive, validate=True)
            except ValueError:  # also for what is no ASCII
                raise InvalidParams("template.archive must be a tar in base64", field="template") from None
        said = overrides if overrides.given else None
        return DeploymentRequest(self.domain, template, self.size, self.env, self.tenant, said, self.clean)


class PublishBody(BaseModel):
    """The body of `POST /v1/tenants/{tenant}/publish`: the domain, and how the published site runs."""

    model_config = ConfigDict(extra="forbid")

    domain: Annotated[types.DomainName, Field(min_length=1)]
    size: types.SizeName = "small"
    env: SiteEnvironment | None = None
    tenant: Annotated[types.TenantName, Field(min_length=1)] | None = None
    start: Start | None = None
    install: Install | None = None

    def request(self, archive: bytes) -> DeploymentRequest:
        overrides = Overrides(start=self.start, install=self.install)
        said = overrides if overrides.given else None
        return DeploymentRequest(self.domain, archive, self.size, self.env, self.tenant, said)

    def deployment(self, archive: bytes) -> bytes:
        """Return the same as the JSON of a `DeployBody`, for another server."""
        said = self.model_dump() | {"template": {"archive": base64.b64encode(archive).decode()}}
        return orjson.dumps(said)


class RollbackBody(BaseModel):
    """The body of `POST /v1/tenants/{tenant}/rollback`."""

    model_config = ConfigDict(extra="forbid")

    to: types.DeploymentId | None = None


class EnvironmentBody(BaseModel):
    """The body of `PATCH /v1/tenants/{tenant}/env`; null removes a variable."""

    model_config = ConfigDict(extra="forbid")

    env: Annotated[
        dict[types.VariableName, types.SiteValue | None], Field(min_length=1, max_length=_VARIABLES)
    ]
