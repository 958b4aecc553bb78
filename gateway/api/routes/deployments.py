"""Routes of deployments and of the templates that can be deployed."""

from __future__ import annotations

import asyncio
from operator import itemgetter
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.access import (
    as_declared,
    check_serving,
    for_tenant,
    idempotency_key,
    parsed,
    queried,
    raw_body,
    using_tenant,
    validated,
    with_token,
)
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
from gateway.api.operation import Operation
from gateway.api.services import services
from gateway.auth.tokens import Token
from gateway.deployments import Record
from gateway.deployments import http as deploying
from gateway.deployments.queue import Owner
from gateway.deployments.register import LISTED
from gateway.deployments.request import Change, Rollback, Variables
from gateway.errors import InvalidParams, NotFound
from gateway.hostnames import normalized, tenant_name


async def templates(request: Request) -> Response:
    """Return the templates that can be deployed by name."""
    with_token(request, "deploy")
    found = await asyncio.to_thread(deploying.templates, services(request).settings)
    return as_json({"templates": found})


async def deploy(request: Request) -> Response:
    """Begin a deployment: bring a domain to a site that answers, or update it.

    A repeated `Idempotency-Key` returns the same deployment.
    """
    token = with_token(request, "deploy")
    check_serving(request)
    text = await raw_body(request, token)
    body = as_declared(request, deploying.DeployBody, parsed(text))
    key = idempotency_key(request)
    tenant = body.tenant or tenant_name(normalized(body.domain))
    servers = services(request).topology
    if token.covers(tenant) and (home := await servers.place(request, tenant)) is not None:
        return home.answer(request, text)
    wanted = await asyncio.to_thread(body.request)
    record, new = await services(request).deployments.begin(wanted, token, key=key)
    return _begun(record, new=new)


def _begun(record: Record, *, new: bool) -> Response:
    response = as_json({"id": record.id, "tenant": record.tenant, "state": record.state})
    response.status_code = 202 if new or not record.over else 200
    response.headers["Location"] = f"/v1/deployments/{record.id}"
    return response


async def publish(request: Request) -> Response:
    """Deploy a copy of a tenant's site to another domain, for production. The site itself stays as it is."""
    name, token = await using_tenant(request, "deploy")
    token.require("files:read")
    check_serving(request)
    body = await validated(request, token, deploying.PublishBody)
    key = idempotency_key(request)
    gateway = services(request)
    domain = normalized(body.domain)
    served = (await gateway.runtime.tenants.get(name)).domain
    if domain == served or name == (body.tenant or tenant_name(domain)):
        raise InvalidParams(
            f"{name} itself is served at {body.domain[:80]}; publish it at another domain",
            field="domain",
        )
    archive = await unless_gone(request, gateway.sources.of(name, Owner.of(token)))
    target = body.tenant or tenant_name(domain)
    servers = gateway.topology
    if token.covers(target) and (home := await servers.place(request, target, here=True)) is not None:
        deploy_body = await asyncio.to_thread(body.deployment, archive)
        return home.answer(request, deploy_body, "/v1/deployments")
    wanted = await asyncio.to_thread(body.request, archive)
    record, new = await gateway.deployments.begin(wanted, token, key=key)
    return _begun(record, new=new)


async def rollback(request: Request) -> Response:
    """Bring back one of the tenant's kept sites, by a new deployment."""
    name, token = for_tenant(request, "deploy")
    check_serving(request)
    body = await validated(request, token, deploying.RollbackBody)
    return await _change(request, name, token, Rollback(body.to))


async def change_environment(request: Request) -> Response:
    """Change a site's environment, by a new deployment. Null removes a variable."""
    name, token = for_tenant(request, "deploy")
    check_serving(request)
    body = await validated(request, token, deploying.EnvironmentBody)
    return await _change(request, name, token, Variables(body.env))


async def _change(request: Request, tenant: str, token: Token, change: Change) -> Response:
    key = idempotency_key(request)
    record, new = await services(request).deployments.change(tenant, change, token, key=key)
    return _begun(record, new=new)


async def environment(request: Request) -> Response:
    """Return the names of the site's variables, and their values to callers who could also run a command."""
    name, token = for_tenant(request, "deploy")
    values = queried(request, EnvironmentQuery).values
    if values:
        token.require("exec")
    gateway = services(request)
    env = await gateway.deployments.environment(name)
    if not values:
        return as_json({"names": sorted(env)})
    await gateway.audit.note(token.subject, "tenant.env.read", name, operator=token.operates)
    return as_json({"names": sorted(env), "env": env})


async def history(request: Request) -> Response:
    """Return a tenant's deployments, which of them is live, and which are kept."""
    name, token = for_tenant(request, "deploy")
    gateway = services(request)
    live, kept = await gateway.deployments.kept(name)
    found = await gateway.deployments.recent(frozenset({name}))
    if token.coverage is not None:
        found = [one for one in found if gateway.names.is_present(one.tenant, one.created)]
    return as_json(
        {
            "deployments": [record.to_dict() for record in found],
            "live": live,
            "kept": [{"id": one.id, "replaced": one.replaced} for one in kept],
        }
    )


async def index(request: Request) -> Response:
    """Return the newest deployments of the tenants that the token covers."""
    gateway, token = services(request), with_token(request, "deploy")
    found, others = await asyncio.gather(
        gateway.deployments.recent(token.coverage), gateway.topology.ask_others(request)
    )
    if token.coverage is not None:
        found = [one for one in found if gateway.names.is_present(one.tenant, one.created)]
    merged = [*(record.to_dict() for record in found), *others.entries("deployments")]
    merged.sort(key=itemgetter("created"), reverse=True)
    return as_json({"deployments": merged[:LISTED], **others.unanswered})


async def show(request: Request) -> Response:
    """Return one deployment."""
    return as_json((await _covered(request)).to_dict())


async def cancel(request: Request) -> Response:
    """Cancel a deployment and return it once it is undone. One that has ended is returned unchanged."""
    record = await _covered(request)
    return as_json((await services(request).deployments.cancel(record.id)).to_dict())


async def _covered(request: Request) -> Record:
    token = with_token(request, "deploy")
    record = await services(request).deployments.get(request.path_params["deployment"])
    if not token.covers(record.tenant):
        raise NotFound("no such deployment")
    return record


_BEGUN: Final = {202: DeploymentBegun, 200: DeploymentBegun}
_KEY: Final = ("Idempotency-Key",)

ROUTES: Final = (
    Operation("/v1/templates", templates, scope="deploy", answers={200: Templates}),
    Operation("/v1/deployments", index, scope="deploy", answers={200: Deployments}),
    Operation(
        "/v1/deployments",
        deploy,
        "POST",
        scope="deploy",
        takes=deploying.DeployBody,
        headers=_KEY,
        answers=_BEGUN,
    ),
    Operation("/v1/deployments/{deployment}", show, scope="deploy", answers={200: Deployment}),
    Operation("/v1/tenants/{tenant}/deployments", history, scope="deploy", answers={200: TenantDeployments}),
    Operation(
        "/v1/tenants/{tenant}/publish",
        publish,
        "POST",
        scope="deploy",
        takes=deploying.PublishBody,
        headers=_KEY,
        answers=_BEGUN,
    ),
    Operation(
        "/v1/tenants/{tenant}/rollback",
        rollback,
        "POST",
        scope="deploy",
        takes=deploying.RollbackBody,
        optional=True,
        headers=_KEY,
        answers=_BEGUN,
    ),
    Operation(
        "/v1/tenants/{tenant}/env",
        environment,
        scope="deploy",
        query=EnvironmentQuery,
        answers={200: Environment},
    ),
    Operation(
        "/v1/tenants/{tenant}/env",
        change_environment,
        "PATCH",
        scope="deploy",
        takes=deploying.EnvironmentBody,
        headers=_KEY,
        answers=_BEGUN,
    ),
    Operation("/v1/deployments/{deployment}", cancel, "DELETE", scope="deploy", answers={200: Deployment}),
)
