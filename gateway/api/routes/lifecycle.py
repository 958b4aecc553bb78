"""Routes that change a tenant: start to destroy, snapshots, clones; and its site's log.

Each change is in the audit once it is done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api.access import end_with, for_tenant, optional_json, using_tenant
from gateway.api.http import as_json
from gateway.api.services import services
from gateway.errors import Timeout, Unavailable
from gateway.lifecycle.lifecycle import Ask, Lifecycle, described

_Work = Callable[[Lifecycle, Ask], Awaitable[Mapping[str, Any] | None]]


async def start(request: Request) -> Response:
    return await _change(request, "start", Lifecycle.start)


async def stop(request: Request) -> Response:
    return await _change(request, "stop", Lifecycle.stop)


async def sleep(request: Request) -> Response:
    gateway = services(request)

    async def work(_: Lifecycle, ask: Ask) -> Mapping[str, Any]:
        await gateway.idle.sleep(ask.tenant)
        return described(await gateway.runtime.get(ask.tenant), gateway.settings)

    return await _change(request, "sleep", work)


async def restart(request: Request) -> Response:
    return await _change(request, "restart", Lifecycle.restart)


async def destroy(request: Request) -> Response:
    return await _change(request, "destroy", Lifecycle.destroy, 204)


async def patch(request: Request) -> Response:
    """Change what the body names: the size, or the domain."""
    ask = await _asked(request)
    if isinstance(ask.body, dict) and "size" in ask.body:
        size = str(ask.body["size"])[:63]
        return await _done(request, ask, "resize", Lifecycle.resize, facts={"size": size})
    return await _done(request, ask, "rename", Lifecycle.rename)


async def clone(request: Request) -> Response:
    return await _change(request, "clone", Lifecycle.clone, 201)


async def snapshots(request: Request) -> Response:
    name, token = for_tenant(request, None)
    ask = Ask(name, request.path_params, request.query_params, await optional_json(request, token), token)
    return as_json(await services(request).lifecycle.snapshots(ask))


async def snapshot(request: Request) -> Response:
    return await _change(request, "snapshot", Lifecycle.snapshot, 201)


async def restore(request: Request) -> Response:
    return await _change(request, "restore", Lifecycle.restore)


async def delete_snapshot(request: Request) -> Response:
    return await _change(request, "delete_snapshot", Lifecycle.delete_snapshot, 204)


async def logs(request: Request) -> Response:
    name, token = await using_tenant(request, "files:read")
    await optional_json(request, token)  # none is needed, but a broken one is refused
    following = await services(request).site_logs.open(name, request.query_params)
    end_with(request, token, following.end)
    return following


async def _change(request: Request, action: str, work: _Work, status: int = 200) -> Response:
    return await _done(request, await _asked(request), action, work, status)


async def _asked(request: Request) -> Ask:
    name, token = for_tenant(request, "deploy")
    body = await optional_json(request, token)
    return Ask(name, request.path_params, request.query_params, body, token)


async def _done(
    request: Request,
    ask: Ask,
    action: str,
    work: _Work,
    status: int = 200,
    facts: Mapping[str, str] | None = None,
) -> Response:
    """Do the work, note it, and answer with what it returned."""
    gateway = services(request)
    noted: dict[str, Any] = {"operator": ask.token.operates, **(facts or {})}
    if "snapshot" in ask.path:
        noted["snapshot"] = ask.path["snapshot"]
    try:
        answer = await work(gateway.lifecycle, ask)
    except (Timeout, Unavailable) as error:
        if request.method == "DELETE":  # it may be gone all the same
            noted["error"] = error.code
            await gateway.audit.note(ask.token.subject, f"tenant.{action}", ask.tenant, **noted)
        raise
    await gateway.audit.note(ask.token.subject, f"tenant.{action}", ask.tenant, **noted)
    if answer is None:
        return Response(status_code=status)
    response = as_json(answer)
    response.status_code = status
    return response


ROUTES: Final = (
    Route("/v1/tenants/{tenant}/start", start, methods=["POST"]),
    Route("/v1/tenants/{tenant}/stop", stop, methods=["POST"]),
    Route("/v1/tenants/{tenant}/sleep", sleep, methods=["POST"]),
    Route("/v1/tenants/{tenant}/restart", restart, methods=["POST"]),
    Route("/v1/tenants/{tenant}", destroy, methods=["DELETE"]),
    Route("/v1/tenants/{tenant}", patch, methods=["PATCH"]),
    Route("/v1/tenants/{tenant}/clone", clone, methods=["POST"]),
    Route("/v1/tenants/{tenant}/snapshots", snapshots),
    Route("/v1/tenants/{tenant}/snapshots", snapshot, methods=["POST"]),
    Route("/v1/tenants/{tenant}/snapshots/{snapshot}/restore", restore, methods=["POST"]),
    Route("/v1/tenants/{tenant}/snapshots/{snapshot}", delete_snapshot, methods=["DELETE"]),
    Route("/v1/tenants/{tenant}/logs", logs),
)
