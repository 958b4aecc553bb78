"""Routes of tenants: what they are, what changes them from start to destroy, and the sites that they serve.

Each change is recorded in the audit log once it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from itertools import chain
from typing import Any, Final

from starlette.responses import Response

from gateway import protocol
from gateway.api import preview
from gateway.api.access import end_with, optional_json
from gateway.api.answers import (
    LogsQuery,
    Ports,
    PreviewKey,
    Site,
    Snapshot,
    Snapshots,
    Tenant,
    Tenants,
    TenantShown,
    TenantsQuery,
    Usage,
    WakeQuery,
)
from gateway.api.http import RETRY_AFTER_MS, unless_gone
from gateway.api.operation import ANY, OPEN, ApiCall, ApiRoutes, Media
from gateway.errors import GatewayError, Timeout, Unavailable
from gateway.lifecycle.lifecycle import (
    Ask,
    CloneBody,
    Lifecycle,
    RenameBody,
    ResizeBody,
    SnapshotBody,
    described,
)

_LISTENED: Final = 64  # listening ports returned for one tenant, at most


tenants = ApiRoutes("tenants")


@tenants("GET", "/v1/tenants", scope=ANY, answers={200: Tenants})
async def index(call: ApiCall, query: TenantsQuery) -> Mapping[str, Any]:
    """Return the tenants that the token covers, sorted by name."""
    gateway, token = call.gateway, call.token
    here, others = await asyncio.gather(gateway.runtime.tenants.list(), gateway.topology.ask_others(call))
    own = (described(tenant, gateway.settings) for tenant in here if token.covers(tenant.name))
    absent = gateway.topology.absent(token, others)
    # where two have one name it is about to move: the last word has whoever serves it, the first who is away
    found = {entry["name"]: entry for entry in chain(absent, others.entries("tenants"), own)}
    tenants = [found[name] for name in sorted(found) if name > query.after]
    shown = tenants if query.limit is None else tenants[: query.limit]
    partly = any("next" in answer for answer in others.answers)
    more = {"next": shown[-1]["name"]} if shown and (partly or len(shown) < len(tenants)) else {}
    return {"tenants": shown, **more, **others.unanswered}


@tenants("GET", "/v1/tenants/{tenant}", scope=ANY, answers={200: TenantShown})
async def show(call: ApiCall) -> Mapping[str, Any]:
    """Return a tenant and what it uses."""
    gateway = call.gateway
    tenant = await gateway.runtime.tenants.get(call.tenant)
    usage = await gateway.runtime.usage.metrics(call.tenant) if tenant.status == "running" else None
    more = gateway.topology.described(call.tenant)
    return described(tenant, gateway.settings) | {"usage": usage, **more}


@tenants("GET", "/v1/tenants/{tenant}/metrics", scope=ANY, answers={200: Usage})
async def metrics(call: ApiCall) -> Mapping[str, Any]:
    """Return what a tenant uses."""
    return await call.gateway.runtime.usage.metrics(call.tenant)


@tenants("GET", "/v1/tenants/{tenant}/site", scope=ANY, answers={200: Site})
async def site(call: ApiCall) -> Mapping[str, Any]:
    """Request the tenant's site under its domain, and return whether it answers."""
    tenant = await call.gateway.runtime.tenants.get(call.tenant)  # raises where there is none
    found: Mapping[str, Any] = await unless_gone(call, call.gateway.health.now(tenant.name))
    return found


@tenants("GET", "/v1/tenants/{tenant}/ports", scope=ANY, answers={200: Ports})
async def ports(call: ApiCall) -> Mapping[str, Any]:
    """Return the ports on which the tenant's processes listen. Runs nothing inside the tenant."""
    gateway = call.gateway
    await gateway.runtime.tenants.get(call.tenant)  # raises where there is none
    found = sorted(
        await gateway.sites.services.listening(call.tenant), key=lambda one: (one.port, one.address)
    )
    return {"ports": [{"port": one.port, "address": one.address} for one in found[:_LISTENED]]}


@tenants("POST", "/v1/tenants/{tenant}/preview", scope=ANY, answers={200: PreviewKey})
async def preview_key(call: ApiCall) -> Mapping[str, Any]:
    """Return a key with which the site's pages report their errors to the requesting page."""
    tenant = await call.gateway.runtime.tenants.get(call.tenant)
    origin = preview.origin_of(call.headers.get("origin"))
    key, ends = call.gateway.previews.key(tenant.domain, origin)
    return {"parameter": preview.PARAMETER, "key": key, "expires": ends}


@tenants("GET", "/v1/preview", scope=OPEN, answers={200: Media("text/html", text=True), 307: None})
async def previewed(call: ApiCall) -> Response:
    """Return a site's page with the console's script. Caddy calls this for the editor's preview."""
    return await call.gateway.previews.answer(call)


@tenants("GET", "/v1/wake", scope=OPEN, answers={204: None}, errors=Media("text/plain", text=True))
async def wake(call: ApiCall, query: WakeQuery) -> Response | None:
    """Wait for the site at a domain, asleep or held. Caddy calls this for visitors; no token is needed."""
    try:
        await call.gateway.idle.visit(query.domain)
    except GatewayError as error:
        text = f"This site does not answer yet: {error.message}.\n"
        retry = {"Retry-After": str(RETRY_AFTER_MS // 1000)}
        return Response(text, error.http_status, headers=retry, media_type="text/plain")
    return None


# --- changes ------------------------------------------------------------------------------------------

lifecycle = ApiRoutes("lifecycle")

_Work = Callable[[Lifecycle, Ask], Awaitable[Mapping[str, Any] | None]]


@lifecycle("POST", "/v1/tenants/{tenant}/start", scope="deploy", answers={200: Tenant})
async def start(call: ApiCall) -> Mapping[str, Any] | None:
    """Start a tenant."""
    return await _change(call, "start", Lifecycle.start)


@lifecycle("POST", "/v1/tenants/{tenant}/stop", scope="deploy", answers={200: Tenant})
async def stop(call: ApiCall) -> Mapping[str, Any] | None:
    """Stop a tenant; no visitor or request wakes it."""
    return await _change(call, "stop", Lifecycle.stop)


@lifecycle("POST", "/v1/tenants/{tenant}/sleep", scope="deploy", answers={200: Tenant})
async def sleep(call: ApiCall) -> Mapping[str, Any] | None:
    """Stop a tenant until the next visitor or request wakes it."""
    gateway = call.gateway

    async def work(_: Lifecycle, ask: Ask) -> Mapping[str, Any]:
        await gateway.idle.sleep(ask.tenant)
        return described(await gateway.runtime.tenants.get(ask.tenant), gateway.settings)

    return await _change(call, "sleep", work)


@lifecycle("POST", "/v1/tenants/{tenant}/restart", scope="deploy", answers={200: Tenant})
async def restart(call: ApiCall) -> Mapping[str, Any] | None:
    """Stop a tenant and start it again."""
    return await _change(call, "restart", Lifecycle.restart)


@lifecycle("DELETE", "/v1/tenants/{tenant}", scope="manage", answers={204: None})
async def destroy(call: ApiCall) -> Mapping[str, Any] | None:
    """Destroy a tenant and everything in it."""
    return await _change(call, "destroy", Lifecycle.destroy)


@lifecycle(
    "PATCH", "/v1/tenants/{tenant}", scope="deploy", takes=RenameBody | ResizeBody, answers={200: Tenant}
)
async def patch(call: ApiCall) -> Mapping[str, Any] | None:
    """Change the size, which also needs the scope `manage`, or the domain, whichever the body names."""
    body = await optional_json(call, call.token)
    if isinstance(body, dict) and "size" in body:
        call.token.require("manage")
        resize = protocol.validate(ResizeBody, body)
        return await _done(call, _ask(call, resize), "resize", Lifecycle.resize, {"size": resize.size})
    return await _done(call, _ask(call, protocol.validate(RenameBody, body)), "rename", Lifecycle.rename)


@lifecycle("POST", "/v1/tenants/{tenant}/clone", scope="deploy", takes=CloneBody, answers={201: Tenant})
async def clone(call: ApiCall) -> Mapping[str, Any] | None:
    """Create a tenant whose disk is a copy of this one's, or of one of its snapshots."""
    body = protocol.validate(CloneBody, await optional_json(call, call.token))
    return await _done(call, _ask(call, body), "clone", Lifecycle.clone)


@lifecycle("GET", "/v1/tenants/{tenant}/snapshots", scope=ANY, answers={200: Snapshots})
async def snapshots(call: ApiCall) -> Mapping[str, Any]:
    """Return a tenant's snapshots, oldest first."""
    ask = _ask(call, await optional_json(call, call.token))
    return await call.gateway.lifecycle.snapshots(ask)


@lifecycle("POST", "/v1/tenants/{tenant}/snapshots", scope="deploy", optional=True, answers={201: Snapshot})
async def snapshot(call: ApiCall, body: SnapshotBody) -> Mapping[str, Any] | None:
    """Create a snapshot of the disk."""
    return await _done(call, _ask(call, body), "snapshot", Lifecycle.snapshot)


@lifecycle("POST", "/v1/tenants/{tenant}/snapshots/{snapshot}/restore", scope="deploy", answers={200: Tenant})
async def restore(call: ApiCall) -> Mapping[str, Any] | None:
    """Restore the disk from a snapshot. The tenant is stopped for this."""
    return await _change(call, "restore", Lifecycle.restore)


@lifecycle("DELETE", "/v1/tenants/{tenant}/snapshots/{snapshot}", scope="manage", answers={204: None})
async def delete_snapshot(call: ApiCall) -> Mapping[str, Any] | None:
    """Delete a snapshot."""
    return await _change(call, "delete_snapshot", Lifecycle.delete_snapshot)


@lifecycle(
    "GET",
    "/v1/tenants/{tenant}/logs",
    scope="files:read",
    awake=True,
    answers={200: Media("text/plain", text=True)},
)
async def logs(call: ApiCall, query: LogsQuery) -> Response:
    """Return the last lines of the site's journal."""
    await optional_json(call, call.token)  # a body is optional, but an invalid one is refused
    following = await call.gateway.site_logs.open(call.tenant, query.lines, follow=query.follow)
    end_with(call, call.token, following.end)
    return following


def _ask(call: ApiCall, body: Any) -> Ask:
    return Ask(call.tenant, call.path_params, call.query_params, body, call.token)


async def _change(call: ApiCall, action: str, work: _Work) -> Mapping[str, Any] | None:
    return await _done(call, _ask(call, await optional_json(call, call.token)), action, work)


async def _done(
    call: ApiCall, ask: Ask, action: str, work: _Work, facts: Mapping[str, str] | None = None
) -> Mapping[str, Any] | None:
    """Do the work, record it, and return its result."""
    gateway = call.gateway
    noted: dict[str, Any] = {"operator": ask.token.operates, **(facts or {})}
    if "snapshot" in ask.path:
        noted["snapshot"] = ask.path["snapshot"]
    try:
        answer = await work(gateway.lifecycle, ask)
    except (Timeout, Unavailable) as error:
        if call.method == "DELETE":  # it may still have been removed
            noted["error"] = error.code
            await gateway.audit.note(ask.token.subject, f"tenant.{action}", ask.tenant, **noted)
        raise
    await gateway.audit.note(ask.token.subject, f"tenant.{action}", ask.tenant, **noted)
    return answer
