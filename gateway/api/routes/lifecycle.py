"""Routes that change a tenant, from start to destroy, snapshots and clones; and its site's log.

Each change is recorded in the audit log once it is done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.access import as_declared, end_with, for_tenant, optional_json, queried, using_tenant
from gateway.api.answers import LogsQuery, Snapshot, Snapshots, Tenant
from gateway.api.http import as_json
from gateway.api.operation import ANY, Media, Operation
from gateway.api.services import services
from gateway.errors import Timeout, Unavailable
from gateway.lifecycle.lifecycle import (
    Ask,
    CloneBody,
    Lifecycle,
    RenameBody,
    ResizeBody,
    SnapshotBody,
    described,
)

_Work = Callable[[Lifecycle, Ask], Awaitable[Mapping[str, Any] | None]]


async def start(request: Request) -> Response:
    """Start a tenant."""
    return await _change(request, "start", Lifecycle.start)


async def stop(request: Request) -> Response:
    """Stop a tenant; no visitor or request wakes it."""
    return await _change(request, "stop", Lifecycle.stop)


async def sleep(request: Request) -> Response:
    """Stop a tenant until the next visitor or request wakes it."""
    gateway = services(request)

    async def work(_: Lifecycle, ask: Ask) -> Mapping[str, Any]:
        await gateway.idle.sleep(ask.tenant)
        return described(await gateway.runtime.tenants.get(ask.tenant), gateway.settings)

    return await _change(request, "sleep", work)


async def restart(request: Request) -> Response:
    """Stop a tenant and start it again."""
    return await _change(request, "restart", Lifecycle.restart)


async def destroy(request: Request) -> Response:
    """Destroy a tenant and everything in it."""
    return await _change(request, "destroy", Lifecycle.destroy, 204, scope="manage")


async def patch(request: Request) -> Response:
    """Change the size, which also needs the scope `manage`, or the domain, whichever the body names."""
    ask = await _asked(request)
    if isinstance(ask.body, dict) and "size" in ask.body:
        ask.token.require("manage")
        resize = as_declared(request, ResizeBody, ask.body)
        ask = replace(ask, body=resize)
        return await _done(request, ask, "resize", Lifecycle.resize, facts={"size": resize.size})
    ask = replace(ask, body=as_declared(request, RenameBody, ask.body))
    return await _done(request, ask, "rename", Lifecycle.rename)


async def clone(request: Request) -> Response:
    """Create a tenant whose disk is a copy of this one's, or of one of its snapshots."""
    ask = await _asked(request, CloneBody)
    return await _done(request, ask, "clone", Lifecycle.clone, 201)


async def snapshots(request: Request) -> Response:
    """Return a tenant's snapshots, oldest first."""
    name, token = for_tenant(request, None)
    ask = Ask(name, request.path_params, request.query_params, await optional_json(request, token), token)
    return as_json(await services(request).lifecycle.snapshots(ask))


async def snapshot(request: Request) -> Response:
    """Create a snapshot of the disk."""
    ask = await _asked(request, SnapshotBody)
    return await _done(request, ask, "snapshot", Lifecycle.snapshot, 201)


async def restore(request: Request) -> Response:
    """Restore the disk from a snapshot. The tenant is stopped for this."""
    return await _change(request, "restore", Lifecycle.restore)


async def delete_snapshot(request: Request) -> Response:
    """Delete a snapshot."""
    return await _change(request, "delete_snapshot", Lifecycle.delete_snapshot, 204, scope="manage")


async def logs(request: Request) -> Response:
    """Return the last lines of the site's journal."""
    name, token = await using_tenant(request, "files:read")
    query = queried(request, LogsQuery)
    await optional_json(request, token)  # a body is optional, but an invalid one is refused
    following = await services(request).site_logs.open(name, query.lines, follow=query.follow)
    end_with(request, token, following.end)
    return following


async def _change(
    request: Request, action: str, work: _Work, status: int = 200, *, scope: str = "deploy"
) -> Response:
    return await _done(request, await _asked(request, scope=scope), action, work, status)


async def _asked(request: Request, model: type[BaseModel] | None = None, *, scope: str = "deploy") -> Ask:
    name, token = for_tenant(request, scope)
    body = await optional_json(request, token)
    if model is not None:
        body = as_declared(request, model, body)
    return Ask(name, request.path_params, request.query_params, body, token)


async def _done(
    request: Request,
    ask: Ask,
    action: str,
    work: _Work,
    status: int = 200,
    facts: Mapping[str, str] | None = None,
) -> Response:
    """Do the work, record it, and answer with its result."""
    gateway = services(request)
    noted: dict[str, Any] = {"operator": ask.token.operates, **(facts or {})}
    if "snapshot" in ask.path:
        noted["snapshot"] = ask.path["snapshot"]
    try:
        answer = await work(gateway.lifecycle, ask)
    except (Timeout, Unavailable) as error:
        if request.method == "DELETE":  # it may still have been removed
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
    Operation("/v1/tenants/{tenant}/start", start, "POST", scope="deploy", answers={200: Tenant}),
    Operation("/v1/tenants/{tenant}/stop", stop, "POST", scope="deploy", answers={200: Tenant}),
    Operation("/v1/tenants/{tenant}/sleep", sleep, "POST", scope="deploy", answers={200: Tenant}),
    Operation("/v1/tenants/{tenant}/restart", restart, "POST", scope="deploy", answers={200: Tenant}),
    Operation("/v1/tenants/{tenant}", destroy, "DELETE", scope="manage", answers={204: None}),
    Operation(
        "/v1/tenants/{tenant}",
        patch,
        "PATCH",
        scope="deploy",
        takes=RenameBody | ResizeBody,
        answers={200: Tenant},
    ),
    Operation(
        "/v1/tenants/{tenant}/clone",
        clone,
        "POST",
        scope="deploy",
        takes=CloneBody,
        answers={201: Tenant},
    ),
    Operation("/v1/tenants/{tenant}/snapshots", snapshots, scope=ANY, answers={200: Snapshots}),
    Operation(
        "/v1/tenants/{tenant}/snapshots",
        snapshot,
        "POST",
        scope="deploy",
        takes=SnapshotBody,
        optional=True,
        answers={201: Snapshot},
    ),
    Operation(
        "/v1/tenants/{tenant}/snapshots/{snapshot}/restore",
        restore,
        "POST",
        scope="deploy",
        answers={200: Tenant},
    ),
    Operation(
        "/v1/tenants/{tenant}/snapshots/{snapshot}",
        delete_snapshot,
        "DELETE",
        scope="manage",
        answers={204: None},
    ),
    Operation(
        "/v1/tenants/{tenant}/logs",
        logs,
        scope="files:read",
        query=LogsQuery,
        answers={200: Media("text/plain", text=True)},
    ),
)
