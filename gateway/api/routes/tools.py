"""Routes that do work in a tenant: tools, MCP, and commands that run within one request."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway import protocol
from gateway.api.access import (
    check_serving,
    for_tenant,
    idempotency_key,
    json_body,
    raw_body,
    using_tenant,
    validated,
)
from gateway.api.answers import Ran
from gateway.api.http import SHARE, USES, InParts, hold, problem, unless_gone
from gateway.api.mcp_loading import McpEndpoint
from gateway.api.oneshot import ExecBody, run
from gateway.api.operation import ANY, OF_TOOL, Media, Operation
from gateway.api.services import services
from gateway.auth.tokens import Token
from gateway.errors import InvalidParams, NotFound
from gateway.limits.budget import SMALL
from gateway.protocol.results import ToolResult


async def call(request: Request) -> Response:
    """Call a tool. The body is its input. A failure of the tool itself is a result with `isError`."""
    toolbox, tool = services(request).toolbox, request.path_params["tool"]
    name, token = await using_tenant(request, toolbox.scope(tool))
    arguments = await json_body(request, token)
    if not isinstance(arguments, dict):
        raise InvalidParams("the body must be a JSON object, the tool's input")
    session = toolbox.sessions.open(
        name,
        request.headers.get("x-tool-session"),
        protocol.switch(request.headers, "x-read-before-write"),
    )
    call_id = idempotency_key(request)
    linger_ms = request.headers.get("x-call-linger")
    if linger_ms is not None and not (linger_ms.isdecimal() and len(linger_ms) < 16):
        raise InvalidParams("X-Call-Linger must be a number of milliseconds")
    linger = None if linger_ms is None else int(linger_ms) / 1000
    work = toolbox.call(name, session, tool, arguments, by=token.subject, call_id=call_id, linger=linger)
    result = await unless_gone(request, work)
    if len(result.encoded) > SMALL:  # for tools that only read
        hold(request.scope, len(result.encoded))
    return Response(result.encoded, media_type="application/json")


async def mcp(request: Request) -> Response:
    """Speak MCP's streamable HTTP."""
    gateway = services(request)
    name, token = for_tenant(request, None)
    if gateway.mcp is None:
        missing = NotFound("this gateway does not serve MCP: install its extra mcp and restart it")
        return problem(missing, 501)
    await gateway.runtime.tenants.get(name)
    await using_tenant(request, None)
    return _McpAnswer(gateway.mcp, name, token, await raw_body(request, token))


class _McpAnswer(Response):
    """The MCP endpoint's answer, which it writes itself."""

    def __init__(self, endpoint: McpEndpoint, tenant: str, token: Token, body: bytes) -> None:
        self._answer = partial(endpoint.serve, tenant, token, body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


async def exec(request: Request) -> Response:
    """Run a command; return its output once it has ended."""
    gateway = services(request)
    name, token = await using_tenant(request, "exec")
    check_serving(request)
    body = await validated(request, token, ExecBody)
    room = request.scope[USES].enter_context(request.scope[SHARE].reserve())
    with gateway.runtime.commands.expect(name):  # a caller that asks once is likely to ask again
        work = run(gateway.execs, name, body, token.subject, room)
        return InParts(await unless_gone(request, work))


_MCP: Final = "/v1/tenants/{tenant}/mcp"
_JSON: Final = Media("application/json")

ROUTES: Final = (
    Operation(
        "/v1/tenants/{tenant}/tools/{tool}",
        call,
        "POST",
        scope=OF_TOOL,
        takes=dict[str, Any],
        headers=("X-Tool-Session", "X-Read-Before-Write", "Idempotency-Key", "X-Call-Linger"),
        answers={200: ToolResult},
    ),
    Operation("/v1/tenants/{tenant}/exec", exec, "POST", scope="exec", takes=ExecBody, answers={200: Ran}),
    *(
        Operation(
            _MCP,
            mcp,
            method,
            scope=ANY,
            takes=dict[str, Any] if method == "POST" else None,
            answers={200: (_JSON, Media("text/event-stream", text=True)), 202: None, 405: None},
            errors=_JSON,
        )
        for method in ("GET", "POST", "DELETE")
    ),
)
