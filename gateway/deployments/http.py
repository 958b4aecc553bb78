"""Request and response bodies of deployments and templates over HTTP."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field

from gateway.deployments.entries import read_folder
from gateway.deployments.manifest import MANIFEST, Install, Mode, Overrides, Port, Start
from gateway.deployments.request import Request
from gateway.deployments.template import checked, names
from gateway.errors import GatewayError, InvalidParams
from gateway.protocol import types
from gateway.settings import Settings

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

    def request(self) -> Request:
        """Return the request. Raises `InvalidParams` for an archive that is not base64."""
        template: str | bytes
        overrides = Overrides(start=self.start, install=self.install, port=self.port, mode=self.mode)
        if isinstance(self.template, str):
            template = self.template
            if overrides.said:
                field = next(iter(overrides.said))
                raise InvalidParams(
                    f"{field} is only for an archive; a named template has its own", field=field
                )
        else:
            try:
                template = base64.b64decode(self.template.archive, validate=True)
            except ValueError:  # also for what is no ASCII
                raise InvalidParams("template.archive must be a tar in base64", field="template") from None
        said = overrides if overrides.said else None
        return Request(self.domain, template, self.size, self.env, self.tenant, said, self.clean)


class PublishBody(BaseModel):
    """The body of `POST /v1/tenants/{tenant}/publish`: the domain, and how the published site runs."""

    model_config = ConfigDict(extra="forbid")

    domain: Annotated[types.DomainName, Field(min_length=1)]
    size: types.SizeName = "small"
    env: SiteEnvironment | None = None
    tenant: Annotated[types.TenantName, Field(min_length=1)] | None = None
    start: Start | None = None
    install: Install | None = None

    def request(self, archive: bytes) -> Request:
        overrides = Overrides(start=self.start, install=self.install)
        said = overrides if overrides.said else None
        return Request(self.domain, archive, self.size, self.env, self.tenant, said)

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


def templates(settings: Settings) -> list[dict[str, Any]]:
    """Return the templates that can be deployed by name; a broken one with its error."""
    told: list[dict[str, Any]] = []
    for name, folder in names(settings).items():
        try:
            manifest = checked(name, read_folder(folder, settings), settings, shared=True).manifest
            told.append({"name": name, "description": manifest.description, "port": manifest.port})
        except (GatewayError, OSError) as error:
            why = error.message if isinstance(error, GatewayError) else f"{MANIFEST} cannot be read"
            told.append({"name": name, "description": "", "error": why})
    return told
