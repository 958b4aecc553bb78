"""A tenant's MCP endpoint: the toolbox's tools over streamable HTTP, using the package `mcp`.

Nothing is kept between requests. A client of protocol 2026-07-28 has no session at all: it cancels a call by
dropping the response. A client of the handshake protocols (2025-11-25 and before) gets a random session id,
which only names its tool session and its calls, so that it can cancel one by a notification.

A tenant's history is served too: the turns as resources, and a tool to undo one.

Imported only by `mcp_loading`, since `mcp` is an extra, and large.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import anyio
import mcp_types as types
import orjson
from mcp.server import Server
from mcp.server.context import ServerRequestContext
from mcp.server.streamable_http import REQUEST_CANCELLED
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway import __version__
from gateway.api.http import hold
from gateway.auth.tokens import Token
from gateway.errors import GatewayError, InvalidParams, NotFound, TooLarge, Unavailable
from gateway.history import History
from gateway.limits.budget import SMALL
from gateway.protocol import HistoryUndo, McpMessage, maxima, switch, validate
from gateway.protocol.maxima import MCP_MAX
from gateway.settings import Settings
from gateway.tools.toolbox import EncodedResult, Toolbox

# --- history -------------------------------------------------------------------------------------------


_LIST: Final = "history:///turns"
_TURN: Final = "history:///turns/"

# fixed, since a client may request the list at each connection, and no git should run for that
_RESOURCES: Final = types.ListResourcesResult(
    resources=[
        types.Resource(
            name="turns",
            title="Turns",
            uri=_LIST,
            description="What agents changed in this project, turn by turn, latest first.",
            mime_type="application/json",
        )
    ]
)
_TEMPLATES: Final = types.ListResourceTemplatesResult(
    resource_templates=[
        types.ResourceTemplate(
            name="turn",
            title="Turn",
            uri_template=f"{_TURN}{{turn}}",
            description="What one turn changed, as a patch.",
            mime_type="text/x-diff",
        )
    ]
)

_UNDO: Final = types.Tool(
    name="UndoTurn",
    description=(
        "Takes back exactly what one turn changed in this project; what was changed later stays. The "
        f"resource {_LIST} lists the turns. Where later changes are of the same lines, nothing is changed, "
        "and the answer has the paths in `conflicts`; those repeated in `force` become what they were before "
        "the turn. The undo is a turn too, and can be undone."
    ),
    input_schema=HistoryUndo.model_json_schema(by_alias=True),
    annotations=types.ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False),
)


async def _undo(
    history: History, tenant: str, token: Token, arguments: Mapping[str, Any]
) -> types.CallToolResult:
    """Take back a turn. Raises what `History.undo` raises, and `InvalidParams`."""
    token.require("files:write")
    given = validate(HistoryUndo, arguments)
    done = await history.undo(tenant, given.turn, given.force, token.subject)
    text = types.TextContent(text=orjson.dumps(done).decode())
    return types.CallToolResult(content=[text], structured_content=done)


async def _read_resource(history: History, tenant: str, token: Token, uri: str) -> types.ReadResourceResult:
    """Return a resource. Raises `MCPError`."""
    try:
        token.require("files:read")
        if uri == _LIST:
            text, kind = orjson.dumps(await history.turns(tenant)).decode(), "application/json"
        elif uri.startswith(_TURN):
            shown = await history.changes(tenant, uri.removeprefix(_TURN))
            text, kind = f"{shown['title']}\n\n{shown['diff']}", "text/x-diff"
        else:
            raise MCPError(
                types.INVALID_PARAMS, f"no resource {uri[:200]}; there are {_LIST} and {_TURN}TURN"
            )
    except GatewayError as error:
        raise MCPError(types.INVALID_PARAMS, error.message, {**error.facts, "code": error.code}) from None
    return types.ReadResourceResult(contents=[types.TextResourceContents(uri=uri, mime_type=kind, text=text)])


# --- the endpoint --------------------------------------------------------------------------------------


# seconds between progress messages: clients give up calls of which they hear nothing, some after 30 s
PROGRESS_INTERVAL: Final = 15.0

_CALLER: Final = "gateway.api.mcp.caller"
_ARGUMENTS: Final = "gateway.api.mcp.arguments"
_SESSION: Final = "mcp-session-id"
# Claude Code sends the model's id of a call with it, which stays the same if the call is repeated
_CALL_ID: Final = "claudecode/toolUseId"
_FACTS: Final = "incus-gateway/facts"
_READ_ONLY: Final = frozenset({"Read", "Glob", "Grep"})
# Claude Code writes results longer than this to a file on its own host, which our tools cannot read.
# Without this mark it does so above 50 000 characters.
_RESULT_MAX: Final = 500_000
# instead of an embedded file: Claude Code would store that on its own host and give its model the path, and
# most other clients show nothing
_UNSHOWN: Final = (
    "A PDF cannot be shown by this gateway: its pages come as images once whoever runs it has installed the "
    "extra `pdf`. Until then a program in the container may read it, if there is one."
)
_INSTRUCTIONS: Final = (
    "These tools work in a separate Linux container, not on this machine. Its project is in {workspace}; "
    "paths are absolute there or relative to it."
)


@dataclass(frozen=True, slots=True)
class _Caller:
    """The caller of one request: tenant, token, and the tool session for its calls."""

    tenant: str
    token: Token
    session: str | None
    read_before_write: bool
    structured: bool
    handshake: str | None

    @classmethod
    def of(cls, tenant: str, token: Token, headers: Mapping[str, str]) -> _Caller:
        handshake = headers.get(_SESSION)
        if handshake is not None and not 0 < len(handshake) <= 64:
            raise InvalidParams("this Mcp-Session-Id was not issued by a gateway")
        named = headers.get("x-tool-session")
        if named is None and handshake is not None:
            named = _tool_session(handshake)
        careful, structured = (
            switch(headers, name) for name in ("x-read-before-write", "x-structured-content")
        )
        return cls(tenant, token, named, careful, structured, handshake)


def _tool_session(handshake: str) -> str:
    return f"mcp-{handshake}"


class Mcp:
    """The endpoint of all tenants. Use as an async context manager, from the event loop only."""

    def __init__(self, toolbox: Toolbox, history: History, settings: Settings) -> None:
        self._toolbox = toolbox
        self._history = history
        self._tools = [_tool(description) for description in toolbox.descriptions()]
        if history.on:
            self._tools.append(_UNDO)
        schemas = {tool.name: tool.input_schema for tool in self._tools}
        server: Server[Any] = Server(
            "incus-gateway",
            version=__version__,
            instructions=_INSTRUCTIONS.format(workspace=settings.workspace),
            on_list_tools=self._list,
            on_call_tool=self._call,
            on_list_resources=self._resources if history.on else None,
            on_list_resource_templates=self._templates if history.on else None,
            on_read_resource=self._read if history.on else None,
            get_tool_input_schema=schemas.get,
        )
        self._manager = StreamableHTTPSessionManager(
            server, stateless=True, max_request_body_size=maxima.BODY_MAX
        )
        self._running = self._manager.run()
        # calls that a notification may cancel, by tenant, session id and request id
        self._calls: dict[tuple[str, str, types.RequestId], asyncio.Task[EncodedResult]] = {}

    async def __aenter__(self) -> Mcp:
        await self._running.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._running.__aexit__(kind, error, trace)

    async def serve(
        self, tenant: str, token: Token, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer one request whose caller was verified and whose body was read. Raises `InvalidParams`."""
        caller = _Caller.of(tenant, token, Headers(scope=scope))
        match scope["method"]:
            case "POST":
                await self._post(caller, body, scope, receive, send)
            case "DELETE" if caller.handshake is not None:
                await self._toolbox.sessions.end_named(tenant, _tool_session(caller.handshake))
                await Response(status_code=204)(scope, receive, send)
            case _:  # we never send unrequested messages, so a GET stream would stay silent
                await Response(status_code=405, headers={"Allow": "POST, DELETE"})(scope, receive, send)

    async def _post(self, caller: _Caller, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        message, arguments = _parsed(body)
        method = message.get("method")
        if method == "notifications/cancelled" and caller.handshake is not None:
            # it arrives on another connection, where the package would find no call to cancel
            self._cancel(caller.tenant, caller.handshake, message.get("params"))
        given: list[Message] = [{"type": "http.request", "body": _checked(message), "more_body": False}]

        async def replay() -> Message:
            return given.pop() if given else await receive()

        async def send_with_session(answer: Message) -> None:
            if answer["type"] == "http.response.start" and answer["status"] == 200:
                MutableHeaders(scope=answer)[_SESSION] = secrets.token_hex(16)
            await send(answer)

        scope = {**scope, _CALLER: caller, _ARGUMENTS: arguments}
        # a method of the handshake protocols only
        sending = send_with_session if method == "initialize" else send
        await self._manager.handle_request(scope, replay, sending)

    def _cancel(self, tenant: str, handshake: str, params: object) -> None:
        asked = params.get("requestId") if isinstance(params, dict) else None
        if isinstance(asked, str | int) and (work := self._calls.get((tenant, handshake, asked))) is not None:
            work.cancel()

    async def _list(
        self, context: ServerRequestContext[Any, Any], params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=self._tools)

    async def _resources(
        self, context: ServerRequestContext[Any, Any], params: types.PaginatedRequestParams | None
    ) -> types.ListResourcesResult:
        return _RESOURCES

    async def _templates(
        self, context: ServerRequestContext[Any, Any], params: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        return _TEMPLATES

    async def _read(
        self, context: ServerRequestContext[Any, Any], params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        assert context.request is not None
        caller: _Caller = context.request.scope[_CALLER]
        return await _read_resource(self._history, caller.tenant, caller.token, str(params.uri))

    async def _call(
        self, context: ServerRequestContext[Any, Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        """Run a tool; if the request ends first, end the tool and what it runs."""
        assert context.request is not None and context.request_id is not None
        caller: _Caller = context.request.scope[_CALLER]
        arguments: dict[str, Any] = context.request.scope[_ARGUMENTS]
        if params.name == _UNDO.name and self._history.on:
            try:
                return await _undo(self._history, caller.tenant, caller.token, arguments)
            except GatewayError as error:
                return _refusal(error)
        try:
            caller.token.require(self._toolbox.scope(params.name))
            session = self._toolbox.sessions.open(caller.tenant, caller.session, caller.read_before_write)
        except NotFound as error:
            raise MCPError(types.INVALID_PARAMS, error.message) from None
        except GatewayError as error:
            return _refusal(error)
        call_id = _call_id(context.meta)
        work = asyncio.create_task(
            self._toolbox.call(
                caller.tenant,
                session,
                params.name,
                arguments,
                by=caller.token.subject,
                call_id=call_id,
            )
        )
        key = (caller.tenant, caller.handshake or "", context.request_id)
        if caller.handshake is not None:
            self._calls[key] = work
        try:
            await self._wait(context, params.name, work)
            if work.cancelled():
                raise MCPError(REQUEST_CANCELLED, "Request cancelled")
            result = work.result()
            if len(result.encoded) > SMALL:  # for tools that only read
                hold(context.request.scope, len(result.encoded))
            return _answer(result, caller.structured)
        except GatewayError as error:
            return _refusal(error)
        finally:
            if self._calls.get(key) is work:
                del self._calls[key]
            work.cancel()
            # a cancelled scope of anyio cancels everything awaited in it: only behind a shield can one wait
            # until nothing is left of the command
            with anyio.CancelScope(shield=True):
                await asyncio.wait([work])
                if call_id is not None:
                    await self._toolbox.give_up(caller.tenant, call_id)

    async def _wait(
        self, context: ServerRequestContext[Any, Any], name: str, work: asyncio.Task[EncodedResult]
    ) -> None:
        """Wait until `work` is done, reporting progress, without which the client would give up."""
        began = time.monotonic()
        while not (await asyncio.wait([work], timeout=PROGRESS_INTERVAL))[0]:
            seconds = round(time.monotonic() - began, 1)
            await context.session.report_progress(seconds, None, f"{name} has run for {seconds:.0f} s")


def _tool(description: Mapping[str, Any]) -> types.Tool:
    name: str = description["name"]
    read_only = name in _READ_ONLY
    return types.Tool(
        name=name,
        description=description["description"],
        input_schema=description["inputSchema"],
        # read-only calls run concurrently, all others one after another
        annotations=types.ToolAnnotations(
            read_only_hint=read_only, destructive_hint=not read_only, open_world_hint=name == "Bash"
        ),
        _meta={"anthropic/maxResultSizeChars": _RESULT_MAX},
    )


def _call_id(meta: Mapping[str, Any] | None) -> str | None:
    given = (meta or {}).get(_CALL_ID)
    return given if isinstance(given, str) and 0 < len(given) <= 200 else None


def _answer(result: EncodedResult, structured: bool) -> types.CallToolResult:
    """Return a result in MCP's form.

    A success has its facts under `_meta` unless the caller asked for structuredContent: clients take that to
    be the same as the text, and Claude Code shows a model nothing else (seen with 2.1.331). Of a failure it
    has the text too, as `message`.
    """
    answer = types.CallToolResult.model_validate_json(result.encoded, by_name=False)
    if any(isinstance(part, types.EmbeddedResource) for part in answer.content):
        return _refusal(Unavailable(_UNSHOWN))
    if answer.is_error:
        # clients that know structuredContent show their model nothing else
        said = "\n".join(part.text for part in answer.content if isinstance(part, types.TextContent))
        answer.structured_content = {**(answer.structured_content or {}), "message": said}
    elif not structured:
        answer.meta = {_FACTS: answer.structured_content}
        answer.structured_content = None
    return answer


def _refusal(error: GatewayError) -> types.CallToolResult:
    """Return the gateway's refusal as a failed call, since a model never sees protocol errors."""
    return types.CallToolResult(
        content=[types.TextContent(text=error.message)],
        is_error=True,
        structured_content={**error.facts, "code": error.code, "message": error.message},
    )


def _parsed(body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a request's message without the arguments of a tool, and these. Raises `InvalidParams`.

    The body is parsed once: the package would do it again, and copy the arguments, which may be large.
    """
    try:
        message = orjson.loads(body)
    except ValueError:
        raise InvalidParams("the body is not JSON") from None
    if not isinstance(message, dict):
        raise InvalidParams("a message must be a JSON object; batches are not supported")
    message = {name: message[name] for name in McpMessage.model_fields if name in message}
    params = message.get("params")
    if message.get("method") != "tools/call" or not isinstance(params, dict):
        return message, {}
    arguments = params.get("arguments")
    if not isinstance(arguments, dict):
        return message, {}  # the package refuses what is no object
    return {**message, "params": {**params, "arguments": {}}}, arguments


def _checked(message: Mapping[str, Any]) -> bytes:
    """Return what the package is to parse. Raises `InvalidParams`, and `TooLarge`."""
    try:
        encoded = orjson.dumps(message)
    except TypeError:
        raise InvalidParams("the message is nested too deeply") from None
    if len(encoded) > MCP_MAX:
        what = "the message without the arguments of a tool"
        raise TooLarge(f"{what} exceeds {MCP_MAX} bytes", limit=MCP_MAX)
    validate(McpMessage, message)
    return encoded
