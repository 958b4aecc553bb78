"""Routes of turns: those of a tool session, and the tenant's history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from starlette.requests import Request
from starlette.responses import Response

from gateway import protocol
from gateway.api.access import queried, using_tenant, validated
from gateway.api.answers import HistoryQuery
from gateway.api.http import as_json, hold, unless_gone
from gateway.api.operation import Operation
from gateway.api.services import services
from gateway.history import Commit
from gateway.limits.budget import SMALL
from gateway.protocol.results import TurnBegun, TurnChanges, TurnEnded, Turns, Undone
from gateway.tools.session import ToolSession


class RestoreBody(protocol.Params):
    """`to` selects the state: right `after` the turn, or `before` it."""

    to: Literal["after", "before"] = "after"


async def begin(request: Request) -> Response:
    """Begin a turn of the tool session; return the turn that this ended."""
    name, token = await using_tenant(request, "files:write")
    body = await validated(request, token, protocol.TurnBegin)
    history = services(request).history
    before = await history.begin(name, _session(request, name), body.title, body.agent, token.subject)
    return as_json({"before": None if before is None else before.on_wire()})


async def end(request: Request) -> Response:
    """End the tool session's turn; return it once it is recorded."""
    name, token = await using_tenant(request, "files:write")
    return _turn(await services(request).history.end(name, _session(request, name), token.subject))


async def index(request: Request) -> Response:
    """Return the tenant's turns, latest first."""
    name, _ = await using_tenant(request, "files:read")
    query = queried(request, HistoryQuery)
    turns = services(request).history.turns(name, query.limit, query.before)
    return _counted(request, await unless_gone(request, turns))


async def show(request: Request) -> Response:
    """Return a turn with its changes and its patch."""
    name, _ = await using_tenant(request, "files:read")
    changes = services(request).history.changes(name, request.path_params["turn"])
    return _counted(request, await unless_gone(request, changes))


async def restore(request: Request) -> Response:
    """Restore the files as they were right after a turn, or before it, as a new turn."""
    name, token = await using_tenant(request, "files:write")
    side = (await validated(request, token, RestoreBody)).to
    turn = request.path_params["turn"]
    return _turn(await services(request).history.restore(name, turn, side, token.subject))


async def undo(request: Request) -> Response:
    """Take back exactly what a turn changed, as a new turn; later changes stay."""
    name, token = await using_tenant(request, "files:write")
    force = (await validated(request, token, protocol.UndoBody)).force
    turn = request.path_params["turn"]
    return as_json(await services(request).history.undo(name, turn, force, token.subject))


def _counted(request: Request, answer: Mapping[str, Any]) -> Response:
    """Return an answer that counts as in flight until the client has taken it."""
    response = as_json(answer)
    if len(response.body) > SMALL:
        hold(request.scope, len(response.body))
    return response


def _session(request: Request, tenant: str) -> ToolSession:
    """Return the session that the request names, or else that of its subject's single calls."""
    named = request.headers.get("x-tool-session")
    sessions = services(request).toolbox.sessions
    return sessions.open(tenant, named, protocol.switch(request.headers, "x-read-before-write"))


def _turn(turn: Commit | None) -> Response:
    return as_json({"turn": None if turn is None else turn.on_wire()})


_SESSION: Final = ("X-Tool-Session", "X-Read-Before-Write")

ROUTES: Final = (
    Operation(
        "/v1/tenants/{tenant}/turn",
        begin,
        "POST",
        scope="files:write",
        takes=protocol.TurnBegin,
        optional=True,
        headers=_SESSION,
        answers={200: TurnBegun},
    ),
    Operation(
        "/v1/tenants/{tenant}/turn",
        end,
        "DELETE",
        scope="files:write",
        headers=_SESSION,
        answers={200: TurnEnded},
    ),
    Operation(
        "/v1/tenants/{tenant}/history",
        index,
        scope="files:read",
        query=HistoryQuery,
        answers={200: Turns},
    ),
    Operation("/v1/tenants/{tenant}/history/{turn}", show, scope="files:read", answers={200: TurnChanges}),
    Operation(
        "/v1/tenants/{tenant}/history/{turn}/restore",
        restore,
        "POST",
        scope="files:write",
        takes=RestoreBody,
        optional=True,
        answers={200: TurnEnded},
    ),
    Operation(
        "/v1/tenants/{tenant}/history/{turn}/undo",
        undo,
        "POST",
        scope="files:write",
        takes=protocol.UndoBody,
        optional=True,
        answers={200: Undone},
    ),
)
