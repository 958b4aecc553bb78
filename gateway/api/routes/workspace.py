"""Routes that work in a tenant: tools, MCP, commands, single files, and the history of changes.

Files are raw bytes both ways, with conditions as in RFC 9110.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Literal

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway import protocol
from gateway.api.access import check_live, idempotency_key, json_body, keep_awake, raw_body
from gateway.api.answers import HistoryQuery, Ran, RemovalQuery
from gateway.api.http import SHARE, USES, InParts, as_json, file_path, hold, problem, unless_gone
from gateway.api.mcp_loading import McpEndpoint
from gateway.api.oneshot import ExecBody, run
from gateway.api.operation import ANY, OF_TOOL, ApiCall, ApiRoutes, Media
from gateway.auth.tokens import Token
from gateway.errors import Conflict, InvalidParams, NotFound
from gateway.files import http
from gateway.history import Commit
from gateway.limits.budget import SMALL
from gateway.protocol.results import FileWritten, ToolResult, TurnBegun, TurnChanges, TurnEnded, Turns, Undone
from gateway.tools.session import ToolSession

_JSON: Final = Media("application/json")
_BYTES: Final = Media("application/octet-stream")
_CONDITIONS: Final = ("If-Match", "If-None-Match")
_SESSION: Final = ("X-Tool-Session", "X-Read-Before-Write")


tools = ApiRoutes("tools")


@tools(
    "POST",
    "/v1/tenants/{tenant}/tools/{tool}",
    scope=OF_TOOL,
    awake=True,
    takes=dict[str, Any],
    headers=(*_SESSION, "Idempotency-Key", "X-Call-Linger"),
    answers={200: ToolResult},
)
async def call(call: ApiCall) -> Response:
    """Call a tool. The body is its input. A failure of the tool itself is a result with `isError`."""
    toolbox, tool = call.gateway.toolbox, call.path_params["tool"]
    arguments = await json_body(call, call.token)
    if not isinstance(arguments, dict):
        raise InvalidParams("the body must be a JSON object, the tool's input")
    session, call_id = _session(call), idempotency_key(call)
    linger_ms = call.headers.get("x-call-linger")
    if linger_ms is not None and not (linger_ms.isdecimal() and len(linger_ms) < 16):
        raise InvalidParams("X-Call-Linger must be a number of milliseconds")
    linger = None if linger_ms is None else int(linger_ms) / 1000
    by = call.token.subject
    work = toolbox.call(call.tenant, session, tool, arguments, by=by, call_id=call_id, linger=linger)
    result = await unless_gone(call, work)
    if len(result.encoded) > SMALL:  # for tools that only read
        hold(call.scope, len(result.encoded))
    return Response(result.encoded, media_type="application/json")


@tools("POST", "/v1/tenants/{tenant}/exec", scope="exec", awake=True, serving=True, answers={200: Ran})
async def exec(call: ApiCall, body: ExecBody) -> Response:
    """Run a command; return its output once it has ended."""
    gateway = call.gateway
    room = call.scope[USES].enter_context(call.scope[SHARE].reserve())
    with gateway.runtime.commands.expect(call.tenant):  # a caller that asks once is likely to ask again
        work = run(gateway.execs, call.tenant, body, call.token.subject, room)
        return InParts(await unless_gone(call, work))


async def mcp(call: ApiCall) -> Response:
    """Speak MCP's streamable HTTP."""
    gateway = call.gateway
    if gateway.mcp is None:
        missing = NotFound("this gateway does not serve MCP: install its extra mcp and restart it")
        return problem(missing, 501)
    await gateway.runtime.tenants.get(call.tenant)
    await keep_awake(call, call.tenant)
    return _McpAnswer(gateway.mcp, call.tenant, call.token, await raw_body(call, call.token))


for _method in ("GET", "POST", "DELETE"):
    tools(
        _method,
        "/v1/tenants/{tenant}/mcp",
        scope=ANY,
        takes=dict[str, Any] if _method == "POST" else None,
        answers={200: (_JSON, Media("text/event-stream", text=True)), 202: None, 405: None},
        errors=_JSON,
    )(mcp)


class _McpAnswer(Response):
    """The MCP endpoint's answer, which it writes itself."""

    def __init__(self, endpoint: McpEndpoint, tenant: str, token: Token, body: bytes) -> None:
        self._answer = partial(endpoint.serve, tenant, token, body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


def _session(call: ApiCall) -> ToolSession:
    """Return the session that the request names, or else that of its subject's single calls."""
    careful = protocol.switch(call.headers, "x-read-before-write")
    return call.gateway.toolbox.sessions.open(call.tenant, call.headers.get("x-tool-session"), careful)


# --- files --------------------------------------------------------------------------------------------

files = ApiRoutes("files")

_PATH: Final = "/v1/tenants/{tenant}/files/{path:any}"


@files(
    "GET",
    _PATH,
    scope="files:read",
    awake=True,
    headers=("Range", *_CONDITIONS),
    answers={200: _BYTES, 206: _BYTES, 304: None},
)
async def get(call: ApiCall) -> Response:
    """Return the bytes of a file, or one range of them."""
    gateway = call.gateway
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(gateway.files.read(call.tenant, file_path(call)))
        return http.Sending(call, source, stack, gateway.settings.transfer_stall)


@files(
    "PUT",
    _PATH,
    scope="files:write",
    awake=True,
    takes=_BYTES,
    headers=_CONDITIONS,
    answers={201: FileWritten, 200: FileWritten},
)
async def put(call: ApiCall) -> Response:
    """Store the body as a file, atomically once its last byte has arrived."""
    settings, path = call.gateway.settings, file_path(call)
    conditions = http.conditions(call.headers)
    still = partial(check_live, call, call.token)
    body = http.received(call, settings.upload_max, settings.transfer_stall, still)
    try:
        result = await call.gateway.files.write(call.tenant, path, body, conditions, by=call.token.subject)
    except Conflict as error:
        raise http.failed_condition(error) from None
    response = as_json(result)
    response.status_code = 201 if result["created"] else 200
    response.headers["ETag"] = f'"{result["etag"]}"'
    return response


@files("DELETE", _PATH, scope="files:write", awake=True, headers=_CONDITIONS, answers={204: None})
async def delete(call: ApiCall, query: RemovalQuery) -> None:
    """Remove a file, a link itself, or a folder."""
    given = {"path": file_path(call), "recursive": query.recursive, **http.conditions(call.headers)}
    try:
        await call.gateway.files.call(call.tenant, "files/remove", given, by=call.token.subject)
    except Conflict as error:
        raise http.failed_condition(error) from None


# --- turns --------------------------------------------------------------------------------------------

history = ApiRoutes("history")


class RestoreBody(protocol.Params):
    """`to` selects the state: right `after` the turn, or `before` it."""

    to: Literal["after", "before"] = "after"


@history(
    "POST",
    "/v1/tenants/{tenant}/turn",
    scope="files:write",
    awake=True,
    optional=True,
    headers=_SESSION,
    answers={200: TurnBegun},
)
async def begin(call: ApiCall, body: protocol.TurnBegin) -> Mapping[str, Any]:
    """Begin a turn of the tool session; return the turn that this ended."""
    session, by = _session(call), call.token.subject
    before = await call.gateway.history.begin(call.tenant, session, body.title, body.agent, by)
    return {"before": None if before is None else before.on_wire()}


@history(
    "DELETE",
    "/v1/tenants/{tenant}/turn",
    scope="files:write",
    awake=True,
    headers=_SESSION,
    answers={200: TurnEnded},
)
async def end(call: ApiCall) -> Mapping[str, Any]:
    """End the tool session's turn; return it once it is recorded."""
    return _turn(await call.gateway.history.end(call.tenant, _session(call), call.token.subject))


@history("GET", "/v1/tenants/{tenant}/history", scope="files:read", awake=True, answers={200: Turns})
async def index(call: ApiCall, query: HistoryQuery) -> Response:
    """Return the tenant's turns, latest first."""
    turns = call.gateway.history.turns(call.tenant, query.limit, query.before)
    return _counted(call, await unless_gone(call, turns))


@history(
    "GET", "/v1/tenants/{tenant}/history/{turn}", scope="files:read", awake=True, answers={200: TurnChanges}
)
async def show(call: ApiCall) -> Response:
    """Return a turn with its changes and its patch."""
    changes = call.gateway.history.changes(call.tenant, call.path_params["turn"])
    return _counted(call, await unless_gone(call, changes))


@history(
    "POST",
    "/v1/tenants/{tenant}/history/{turn}/restore",
    scope="files:write",
    awake=True,
    optional=True,
    answers={200: TurnEnded},
)
async def restore(call: ApiCall, body: RestoreBody) -> Mapping[str, Any]:
    """Restore the files as they were right after a turn, or before it, as a new turn."""
    turn, by = call.path_params["turn"], call.token.subject
    return _turn(await call.gateway.history.restore(call.tenant, turn, body.to, by))


@history(
    "POST",
    "/v1/tenants/{tenant}/history/{turn}/undo",
    scope="files:write",
    awake=True,
    optional=True,
    answers={200: Undone},
)
async def undo(call: ApiCall, body: protocol.UndoBody) -> Mapping[str, Any]:
    """Take back exactly what a turn changed, as a new turn; later changes stay."""
    turn, by = call.path_params["turn"], call.token.subject
    return await call.gateway.history.undo(call.tenant, turn, body.force, by)


def _counted(call: ApiCall, answer: Mapping[str, Any]) -> Response:
    """Return an answer that counts as in flight until the client has taken it."""
    response = as_json(answer)
    if len(response.body) > SMALL:
        hold(call.scope, len(response.body))
    return response


def _turn(turn: Commit | None) -> Mapping[str, Any]:
    return {"turn": None if turn is None else turn.on_wire()}
