"""Routes that show tenants and their sites, and the one by which a visitor wakes a site."""

from __future__ import annotations

from operator import attrgetter
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api.access import for_tenant, with_token
from gateway.api.http import RETRY_AFTER_MS, as_json
from gateway.api.services import services
from gateway.errors import GatewayError, InvalidParams
from gateway.lifecycle.lifecycle import described

_PAGE: Final = 1000  # tenants of one answer, where a limit is named


async def index(request: Request) -> Response:
    gateway, token = services(request), with_token(request, None)
    limit, after = request.query_params.get("limit"), request.query_params.get("after", "")
    if limit is not None and (not limit.isdecimal() or not 0 < int(limit[:6]) <= _PAGE):
        raise InvalidParams(f"limit must be a number from 1 to {_PAGE}", field="limit")
    tenants = sorted(
        (t for t in await gateway.runtime.list() if token.covers(t.name) and t.name > after),
        key=attrgetter("name"),
    )
    shown = tenants if limit is None else tenants[: int(limit)]
    more = {"next": shown[-1].name} if len(shown) < len(tenants) else {}
    return as_json({"tenants": [described(tenant, gateway.settings) for tenant in shown], **more})


async def show(request: Request) -> Response:
    gateway = services(request)
    name, _ = for_tenant(request, None)
    tenant = await gateway.runtime.get(name)
    usage = await gateway.runtime.metrics(name) if tenant.status == "running" else None
    return as_json(described(tenant, gateway.settings) | {"usage": usage})


async def metrics(request: Request) -> Response:
    name, _ = for_tenant(request, None)
    return as_json(await services(request).runtime.metrics(name))


async def site(request: Request) -> Response:
    gateway = services(request)
    name, _ = for_tenant(request, None)
    tenant = await gateway.runtime.get(name)  # raises where there is none
    return as_json(await gateway.health.now(tenant.name))


async def wake(request: Request) -> Response:
    """Wake the site at a domain. Caddy asks this for visitors; it needs no token."""
    try:
        await services(request).idle.visit(request.query_params.get("domain", ""))
    except GatewayError as error:
        text = f"This site was asleep and could not be woken: {error.message}.\n"
        retry = {"Retry-After": str(RETRY_AFTER_MS // 1000)}
        return Response(text, error.http_status, headers=retry, media_type="text/plain")
    return Response(status_code=204)


ROUTES: Final = (
    Route("/v1/tenants", index),
    Route("/v1/tenants/{tenant}", show),
    Route("/v1/tenants/{tenant}/metrics", metrics),
    Route("/v1/tenants/{tenant}/site", site),
    Route("/v1/wake", wake),
)
