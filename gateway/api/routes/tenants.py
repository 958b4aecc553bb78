"""Routes that show tenants and their sites, and the one that wakes a site for a visitor."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.api import preview
from gateway.api.access import for_tenant, queried, with_token
from gateway.api.answers import Ports, PreviewKey, Site, Tenants, TenantShown, TenantsQuery, Usage, WakeQuery
from gateway.api.http import RETRY_AFTER_MS, as_json, unless_gone
from gateway.api.operation import ANY, OPEN, Media, Operation
from gateway.api.services import services
from gateway.errors import GatewayError
from gateway.lifecycle.lifecycle import described

_LISTENED: Final = 64  # listening ports returned for one tenant, at most


async def index(request: Request) -> Response:
    """Return the tenants that the token covers, sorted by name."""
    gateway, token = services(request), with_token(request, None)
    query = queried(request, TenantsQuery)
    here, others = await asyncio.gather(gateway.runtime.tenants.list(), gateway.topology.ask_others(request))
    own = (described(tenant, gateway.settings) for tenant in here if token.covers(tenant.name))
    absent = gateway.topology.absent(token, others)
    # where two have one name it is about to move: the last word has whoever serves it, the first who is away
    found = {entry["name"]: entry for entry in chain(absent, others.entries("tenants"), own)}
    tenants = [found[name] for name in sorted(found) if name > query.after]
    shown = tenants if query.limit is None else tenants[: query.limit]
    partly = any("next" in answer for answer in others.answers)
    more = {"next": shown[-1]["name"]} if shown and (partly or len(shown) < len(tenants)) else {}
    return as_json({"tenants": shown, **more, **others.unanswered})


async def show(request: Request) -> Response:
    """Return a tenant and what it uses."""
    gateway = services(request)
    name, _ = for_tenant(request, None)
    tenant = await gateway.runtime.tenants.get(name)
    usage = await gateway.runtime.usage.metrics(name) if tenant.status == "running" else None
    more = gateway.topology.described(name)
    return as_json(described(tenant, gateway.settings) | {"usage": usage, **more})


async def metrics(request: Request) -> Response:
    """Return what a tenant uses."""
    name, _ = for_tenant(request, None)
    return as_json(await services(request).runtime.usage.metrics(name))


async def site(request: Request) -> Response:
    """Request the tenant's site under its domain, and return whether it answers."""
    gateway = services(request)
    name, _ = for_tenant(request, None)
    tenant = await gateway.runtime.tenants.get(name)  # raises where there is none
    return as_json(await unless_gone(request, gateway.health.now(tenant.name)))


async def ports(request: Request) -> Response:
    """Return the ports on which the tenant's processes listen. Runs nothing inside the tenant."""
    gateway = services(request)
    name, _ = for_tenant(request, None)
    await gateway.runtime.tenants.get(name)  # raises where there is none
    found = sorted(await gateway.sites.services.listening(name), key=lambda one: (one.port, one.address))
    said: Ports = {"ports": [{"port": one.port, "address": one.address} for one in found[:_LISTENED]]}
    return as_json(said)


async def preview_key(request: Request) -> Response:
    """Return a key with which the site's pages report their errors to the requesting page."""
    gateway = services(request)
    name, _ = for_tenant(request, None)
    tenant = await gateway.runtime.tenants.get(name)
    key, ends = gateway.previews.key(tenant.domain, preview.origin_of(request.headers.get("origin")))
    said: PreviewKey = {"parameter": preview.PARAMETER, "key": key, "expires": ends}
    return as_json(said)


async def previewed(request: Request) -> Response:
    """Return a site's page with the console's script. Caddy calls this for the editor's preview."""
    return await services(request).previews.answer(request)


async def wake(request: Request) -> Response:
    """Wait for the site at a domain, asleep or held. Caddy calls this for visitors; no token is needed."""
    try:
        await services(request).idle.visit(queried(request, WakeQuery).domain)
    except GatewayError as error:
        text = f"This site does not answer yet: {error.message}.\n"
        retry = {"Retry-After": str(RETRY_AFTER_MS // 1000)}
        return Response(text, error.http_status, headers=retry, media_type="text/plain")
    return Response(status_code=204)


ROUTES: Final = (
    Operation("/v1/tenants", index, scope=ANY, query=TenantsQuery, answers={200: Tenants}),
    Operation("/v1/tenants/{tenant}", show, scope=ANY, answers={200: TenantShown}),
    Operation("/v1/tenants/{tenant}/metrics", metrics, scope=ANY, answers={200: Usage}),
    Operation("/v1/tenants/{tenant}/site", site, scope=ANY, answers={200: Site}),
    Operation("/v1/tenants/{tenant}/ports", ports, scope=ANY, answers={200: Ports}),
    Operation("/v1/tenants/{tenant}/preview", preview_key, "POST", scope=ANY, answers={200: PreviewKey}),
    Operation(
        "/v1/preview",
        previewed,
        scope=OPEN,
        answers={200: Media("text/html", text=True), 307: None},
    ),
    Operation(
        "/v1/wake",
        wake,
        scope=OPEN,
        query=WakeQuery,
        answers={204: None},
        errors=Media("text/plain", text=True),
    ),
)
