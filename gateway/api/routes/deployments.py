"""Routes of deployments and of the templates that can be deployed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Final

from starlette.responses import Response

from gateway import protocol
from gateway.api.access import idempotency_key, json_body, parsed, raw_body
from gateway.api.answers import (
    Deployment,
    DeploymentBegun,
    Deployments,
    Environment,
    EnvironmentQuery,
    Templates,
    TenantDeployments,
)
from gateway.api.http import as_json, unless_gone
from gateway.api.operation import ApiCall, ApiRoutes
from gateway.deployments import Record
from gateway.deployments import request as deploying
from gateway.deployments.record import LISTED
from gateway.deployments.request import Change, DeploymentOwner, Rollback, Variables
from gateway.deployments.template import described_templates
from gateway.errors import InvalidParams, NotFound
from gateway.hostnames import normalized, tenant_name

_BEGUN: Final = {202: DeploymentBegun, 200: DeploymentBegun}
_KEY: Final = ("Idempotency-Key",)

routes = ApiRoutes("deployments")


@routes("GET", "/v1/templates", scope="deploy", answers={200: Templates})
async def templates(call: ApiCall) -> Mapping[str, Any]:
    """Return the templates that can be deployed by name."""
    return {"templates": await asyncio.to_thread(described_templates, call.gateway.settings)}


@routes(
    "POST",
    "/v1/deployments",
    scope="deploy",
    serving=True,
    takes=deploying.DeployBody,
    headers=_KEY,
    answers=_BEGUN,
)
async def deploy(call: ApiCall) -> Response:
    """Begin a deployment: bring a domain to a site that answers, or update it.

    A repeated `Idempotency-Key` returns the same deployment.
    """
    gateway, token = call.gateway, call.token
    text = await raw_body(call, token)
    body = protocol.validate(deploying.DeployBody, parsed(text))
    key = idempotency_key(call)
    tenant = body.tenant or tenant_name(normalized(body.domain))
    if token.covers(tenant) and (home := await gateway.topology.place(call, tenant)) is not None:
        return home.answer(call, text)
    wanted = await asyncio.to_thread(body.request)
    record, new = await gateway.deployments.begin(wanted, token, key=key)
    return _begun(record, new=new)


def _begun(record: Record, *, new: bool) -> Response:
    response = as_json({"id": record.id, "tenant": record.tenant, "state": record.state})
    response.status_code = 202 if new or not record.over else 200
    response.headers["Location"] = f"/v1/deployments/{record.id}"
    return response


@routes(
    "POST",
    "/v1/tenants/{tenant}/publish",
    scope="deploy",
    awake=True,
    serving=True,
    takes=deploying.PublishBody,
    headers=_KEY,
    answers=_BEGUN,
)
async def publish(call: ApiCall) -> Response:
    """Deploy a copy of a tenant's site to another domain, for production. The site itself stays as it is."""
    gateway, name, token = call.gateway, call.tenant, call.token
    token.require("files:read")
    body = protocol.validate(deploying.PublishBody, await json_body(call, token))
    key = idempotency_key(call)
    domain = normalized(body.domain)
    served = (await gateway.runtime.tenants.get(name)).domain
    if domain == served or name == (body.tenant or tenant_name(domain)):
        raise InvalidParams(
            f"{name} itself is served at {body.domain[:80]}; publish it at another domain",
            field="domain",
        )
    archive = await unless_gone(call, gateway.sources.of(name, DeploymentOwner.of(token)))
    target = body.tenant or tenant_name(domain)
    servers = gateway.topology
    if token.covers(target) and (home := await servers.place(call, target, here=True)) is not None:
        deploy_body = await asyncio.to_thread(body.deployment, archive)
        return home.answer(call, deploy_body, "/v1/deployments")
    wanted = await asyncio.to_thread(body.request, archive)
    record, new = await gateway.deployments.begin(wanted, token, key=key)
    return _begun(record, new=new)


@routes(
    "POST",
    "/v1/tenants/{tenant}/rollback",
    scope="deploy",
    serving=True,
    optional=True,
    headers=_KEY,
    answers=_BEGUN,
)
async def rollback(call: ApiCall, body: deploying.RollbackBody) -> Response:
    """Bring back one of the tenant's kept sites, by a new deployment."""
    return await _change(call, Rollback(body.to))


@routes("PATCH", "/v1/tenants/{tenant}/env", scope="deploy", serving=True, headers=_KEY, answers=_BEGUN)
async def change_environment(call: ApiCall, body: deploying.EnvironmentBody) -> Response:
    """Change a site's environment, by a new deployment. Null removes a variable."""
    return await _change(call, Variables(body.env))


async def _change(call: ApiCall, change: Change) -> Response:
    key, deployments = idempotency_key(call), call.gateway.deployments
    record, new = await deployments.change(call.tenant, change, call.token, key=key)
    return _begun(record, new=new)


@routes("GET", "/v1/tenants/{tenant}/env", scope="deploy", answers={200: Environment})
async def environment(call: ApiCall, query: EnvironmentQuery) -> Mapping[str, Any]:
    """Return the names of the site's variables, and their values to callers who could also run a command."""
    gateway, name, token = call.gateway, call.tenant, call.token
    if query.values:
        token.require("exec")
    env = await gateway.deployments.environment(name)
    if not query.values:
        return {"names": sorted(env)}
    await gateway.audit.note(token.subject, "tenant.env.read", name, operator=token.operates)
    return {"names": sorted(env), "env": env}


@routes("GET", "/v1/tenants/{tenant}/deployments", scope="deploy", answers={200: TenantDeployments})
async def history(call: ApiCall) -> Mapping[str, Any]:
    """Return a tenant's deployments, which of them is live, and which are kept."""
    gateway, name, token = call.gateway, call.tenant, call.token
    live, kept = await gateway.deployments.kept(name)
    found = await gateway.deployments.recent(frozenset({name}))
    if token.coverage is not None:
        found = [one for one in found if gateway.names.is_present(one.tenant, one.created)]
    return {
        "deployments": [record.to_dict() for record in found],
        "live": live,
        "kept": [{"id": one.id, "replaced": one.replaced} for one in kept],
    }


@routes("GET", "/v1/deployments", scope="deploy", answers={200: Deployments})
async def index(call: ApiCall) -> Mapping[str, Any]:
    """Return the newest deployments of the tenants that the token covers."""
    gateway, token = call.gateway, call.token
    found, others = await asyncio.gather(
        gateway.deployments.recent(token.coverage), gateway.topology.ask_others(call)
    )
    if token.coverage is not None:
        found = [one for one in found if gateway.names.is_present(one.tenant, one.created)]
    merged = [*(record.to_dict() for record in found), *others.entries("deployments")]
    merged.sort(key=itemgetter("created"), reverse=True)
    return {"deployments": merged[:LISTED], **others.unanswered}


@routes("GET", "/v1/deployments/{deployment}", scope="deploy", answers={200: Deployment})
async def show(call: ApiCall) -> Mapping[str, Any]:
    """Return one deployment."""
    return (await _covered(call)).to_dict()


@routes("DELETE", "/v1/deployments/{deployment}", scope="deploy", answers={200: Deployment})
async def cancel(call: ApiCall) -> Mapping[str, Any]:
    """Cancel a deployment and return it once it is undone. One that has ended is returned unchanged."""
    record = await _covered(call)
    return (await call.gateway.deployments.cancel(record.id)).to_dict()


async def _covered(call: ApiCall) -> Record:
    record = await call.gateway.deployments.get(call.path_params["deployment"])
    if not call.token.covers(record.tenant):
        raise NotFound("no such deployment")
    return record
