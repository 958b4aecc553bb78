"""Routes of turns: those of a tool session, and the tenant's history."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import protocol
from gateway.api.access import optional_json, using_tenant
from gateway.api.http import as_json, hold
from gateway.api.services import services
from gateway.errors import InvalidParams
from gateway.history import Turn
from gateway.limits.budget import SMALL
from gateway.tools.session import ToolSession


async def begin(request: Request) -> Response:
    name, token = await using_tenant(request, "files:write")
    body = protocol.validate(protocol.TurnBegin, await optional_json(request, token))
    history = services(request).history
    before = await history.begin(name, _session(request, name), body.title, body.agent, token.subject)
    return as_json({"before": None if before is None else before.on_wire()})


async def end(request: Request) -> Response:
    name, token = await using_tenant(request, "files:write")
    return _turn(await services(request).history.end(name, _session(request, name), token.subject))


async def index(request: Request) -> Response:
    name, _ = await using_tenant(request, "files:read")
    limit, before = request.query_params.get("limit", "50"), request.query_params.get("before")
    if not limit.isdecimal() or not 0 < int(limit[:6]) <= 200:
        raise InvalidParams("limit is a number from 1 to 200", field="limit")
    return as_json(await services(request).history.turns(name, int(limit), before))


async def show(request: Request) -> Response:
    name, _ = await using_tenant(request, "files:read")
    response = as_json(await services(request).history.changes(name, request.path_params["turn"]))
    if len(response.body) > SMALL:
        hold(request.scope, len(response.body))
    return response


async def restore(request: Request) -> Response:
    name, token = await using_tenant(request, "files:write")
    body = await optional_json(request, token)
    if not isinstance(body, dict):
        raise InvalidParams("the body is an object")
    asked = protocol.validate(protocol.HistoryRestore, {**body, "turn": request.path_params["turn"]})
    return _turn(await services(request).history.restore(name, asked.turn, asked.to, token.subject))


def _session(request: Request, tenant: str) -> ToolSession:
    """Return the session that the request names; without a name that of its subject's single calls."""
    named = request.headers.get("x-tool-session")
    sessions = services(request).toolbox.sessions
    return sessions.open(tenant, named, protocol.switch(request.headers, "x-read-before-write"))


def _turn(turn: Turn | None) -> Response:
    return as_json({"turn": None if turn is None else turn.on_wire()})


ROUTES: Final = (
    Route("/v1/tenants/{tenant}/turn", begin, methods=["POST"]),
    Route("/v1/tenants/{tenant}/turn", end, methods=["DELETE"]),
    Route("/v1/tenants/{tenant}/history", index),
    Route("/v1/tenants/{tenant}/history/{turn}", show),
    Route("/v1/tenants/{tenant}/history/{turn}/restore", restore, methods=["POST"]),
)
