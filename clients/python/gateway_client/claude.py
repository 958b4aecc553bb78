"""Run an agent of Claude's Agent SDK in a tenant, with the tenant's tools and nothing of this host.

    async with Client("https://gateway.example", token=…) as client:
        async with ClaudeSDKClient(claude.options(client.tenant("shop"))) as agent:
            await agent.query("Make the heading blue.")
            async for message in agent.receive_response():
                print(message)

The SDK runs Claude Code's CLI on this host with all its built-in tools off; the tenant's tools take their
names. Needs the extra `claude`. Statements about the CLI here hold for version 2.1.331.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, Final, Literal

from gateway_client.errors import GatewayError
from gateway_client.events import EventStream
from gateway_client.extras import needed
from gateway_client.results import ToolResult
from gateway_client.tenant import Tenant

with needed("claude"):
    import anyio
    import mcp_types as types
    from claude_agent_sdk import ClaudeAgentOptions
    from mcp.server import Server
    from mcp.server.context import ServerRequestContext

__all__ = ["Printed", "options", "server"]

log = logging.getLogger(__name__)

SERVER: Final = "tenant"
READ_ONLY: Final = frozenset({"Read", "Glob", "Grep"})
# UTF-16 units of a result's text. Over 500 000 the CLI writes it to a file on this host and shows 2 KB of
# it; over some 10 000 it cuts the middle out of an error. So both are cut here, with a helpful note.
RESULT_MAX: Final = 490_000
ERROR_MAX: Final = 10_000
# bytes of one message of the CLI: a large Write is one message, and at the SDK's default of 1 MiB the
# session ends
MESSAGE_MAX: Final = 64 << 20
# seconds; above the maximum of Bash in the foreground, 600, so that its own answer comes first
TOOL_TIMEOUT: Final = 660.0
# seconds that a result waits for the delivery of its last live output
DRAIN: Final = 5.0

_CALL_ID: Final = "claudecode/toolUseId"
_REFUSED: Final[Mapping[str, str]] = {
    "tools": "the CLI's own tools run on this host, and take precedence over the tenant's of the same name",
    "setting_sources": "settings of this host can run commands on it",
    "settings": "settings of this host can run commands on it",
    "add_dirs": "an agent in a tenant must not reach folders of this host",
    "plugins": "plugins run on this host",
    "skills": "skills are files of this host",
    "strict_mcp_config": "servers of this host's configuration would be added",
    "verbatim_prompts": "an @path in a prompt would read a file of this host",
    "max_buffer_size": "it is set for large inputs already",
}
_ENVIRONMENT: Final[Mapping[str, str]] = {
    # the tools appear as Read and Bash rather than as mcp__tenant__Read: the names that the model knows
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1",
    "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
}
_PROMPT: Final = (
    "Your tools work in a Linux container, not on the machine that you are invoked on: where you are told of "
    "another working directory or platform, this one counts. The project lies in {workspace}, which is the "
    "working directory. Read, Write, Edit, Glob and Grep reach the files below it; Bash runs there as the "
    "user that owns them."
)
# instead of an embedded file: the CLI would store it on this host, and show the model a path out of its reach
_UNSHOWN: Final = (
    "The file itself cannot be shown here: its pages are returned as images once the gateway's operator has "
    "installed the extra `pdf`. Until then a program in the container may be able to read it."
)
_OF_KEPT: Final = ("resume", "continue_conversation", "fork_session", "session_store")


@dataclass(frozen=True, slots=True)
class Printed:
    """A piece of a Bash call's output while it runs. `call` is the model's id of the call, `toolu_…`."""

    call: str
    stream: Literal["stdout", "stderr"]
    data: bytes


OnOutput = Callable[[Printed], Awaitable[None] | None]


def options(
    tenant: Tenant,
    *,
    on_output: OnOutput | None = None,
    system_prompt: str | None = None,
    workspace: str = "/srv/site",
    tool_timeout: float = TOOL_TIMEOUT,
    bare: bool = True,
    persist_session: bool = False,
    env: Mapping[str, str] | None = None,
    mcp_servers: Mapping[str, Any] | None = None,
    allowed_tools: Sequence[str] = (),
    extra_args: Mapping[str, str | None] | None = None,
    **more: Any,
) -> ClaudeAgentOptions:
    """Return options for `ClaudeSDKClient` or `query`: the tenant's eight tools, and nothing of this host.

    `on_output` gets the output of Bash while it runs; a slow function slows down the command. It needs a
    token with the scope `events`. `system_prompt` is yours; a sentence about where the tools work follows it.
    `tool_timeout` is in seconds: a call that takes longer is cancelled, with everything that it runs. Further
    options are the SDK's. Raises `ValueError` for those that would open this host.

    `bare` keeps even the CLI's description of this host out of the conversation; then the SDK's hooks do not
    run, and only ANTHROPIC_API_KEY is used. Without it the model is told the CLI's working directory and
    platform, and that the prompt's description of the container is what counts.

    `persist_session` has the CLI keep the conversation in the user's folder on this host, so that it can be
    resumed. Then it also stores each image that is read there, and tells the model its path.
    """
    for name, why in _REFUSED.items():
        if name in more:
            raise ValueError(f"{name} cannot be set for an agent in a tenant: {why}")
    if bare and more.get("hooks"):
        raise ValueError("hooks need bare=False: the CLI runs none in its bare mode")
    if not persist_session and any(more.get(name) for name in _OF_KEPT):
        raise ValueError("only a stored session can be resumed: set persist_session=True, also at its start")
    if SERVER in (mcp_servers or {}):
        raise ValueError(f"the name {SERVER!r} is taken by the tenant's own tools")
    place = _PROMPT.format(workspace=workspace)
    tools = {"type": "sdk", "name": SERVER, "instance": server(tenant, on_output=on_output)}
    found: dict[str, Any] = {
        # not a user's folder, since the model sees its name
        "cwd": "/",
        **more,
        "tools": [],
        # without alwaysLoad the tools would be hidden behind a search if other servers have many
        "mcp_servers": {
            **(mcp_servers or {}),
            SERVER: {**tools, "timeout": round(tool_timeout * 1000), "alwaysLoad": True},
        },
        "strict_mcp_config": True,
        "setting_sources": [],
        "skills": [],
        "allowed_tools": [*allowed_tools, f"mcp__{SERVER}"],
        "system_prompt": f"{system_prompt}\n\n{place}" if system_prompt else place,
        "verbatim_prompts": True,
        "max_buffer_size": MESSAGE_MAX,
        "env": {**(env or {}), **_ENVIRONMENT},
        "extra_args": {
            **(extra_args or {}),
            **({"bare": None} if bare else {}),
            **({} if persist_session else {"no-session-persistence": None}),
        },
    }
    return ClaudeAgentOptions(**found)


def server(tenant: Tenant, *, on_output: OnOutput | None = None) -> Server[Any]:
    """Return an in-process MCP server with the tenant's tools, for options that you build yourself.

    Read-only tools are marked so that the CLI runs them in parallel. Results have no structuredContent, since
    the CLI would show that to the model instead of the text.
    """
    live = None if on_output is None else _Live(tenant, on_output)

    @contextlib.asynccontextmanager
    async def lifespan(_: Server[Any]) -> AsyncIterator[None]:
        async with live or contextlib.nullcontext():
            yield

    async def list_tools(
        context: ServerRequestContext[Any, Any], params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_described(tool) for tool in await tenant.tools()])

    async def call_tool(
        context: ServerRequestContext[Any, Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        call_id = (context.meta or {}).get(_CALL_ID)
        call = None if call_id is None else str(call_id)
        try:
            with live.awaiting(call) if live and call else contextlib.nullcontext():
                result = await _called(tenant, params.name, params.arguments or {}, call)
        except GatewayError as error:  # the model can report it, or try something else
            return _answer(ToolResult([{"type": "text", "text": error.message}], is_error=True))
        if live and call and params.name == "Bash":
            await live.finish(call, result)
        return _answer(result)

    return Server("incus-gateway", lifespan=lifespan, on_list_tools=list_tools, on_call_tool=call_tool)


async def _called(tenant: Tenant, name: str, arguments: Mapping[str, Any], call_id: str | None) -> ToolResult:
    """Call a tool in a separate task: anyio repeats a cancellation at every await, and cancelling the call
    in the gateway takes one."""
    work = asyncio.ensure_future(tenant.tool(name, arguments, call_id))
    try:
        return await asyncio.shield(work)
    finally:
        work.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([work])


def _described(tool: Mapping[str, Any]) -> types.Tool:
    read_only = tool["name"] in READ_ONLY
    return types.Tool(
        name=tool["name"],
        description=tool["description"],
        input_schema=tool["inputSchema"],
        annotations=types.ToolAnnotations(read_only_hint=read_only, destructive_hint=not read_only),
        _meta={"anthropic/maxResultSizeChars": 500_000, "anthropic/alwaysLoad": True},
    )


def _answer(result: ToolResult) -> types.CallToolResult:
    content: list[types.ContentBlock] = []
    room = ERROR_MAX if result.is_error else RESULT_MAX
    for part in result.content:
        if part["type"] == "image":
            content.append(types.ImageContent(data=part["data"], mime_type=part["mimeType"]))
        elif part["type"] == "text":
            text = _cut(part["text"], room, middle=result.is_error)
            room = max(0, room - _units(text))
            content.append(types.TextContent(text=text))
        elif part["type"] == "resource":
            # a whole PDF of a gateway that cannot draw its pages
            return types.CallToolResult(content=[types.TextContent(text=_UNSHOWN)], is_error=True)
    return types.CallToolResult(content=content, is_error=result.is_error)


def _units(text: str) -> int:
    """Return the length in UTF-16 units, as JavaScript counts it."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2


def _cut(text: str, limit: int, *, middle: bool) -> str:
    """Cut `text` to `limit` UTF-16 units: to its beginning, or to its two ends."""
    size = _units(text)
    if size <= limit:
        return text
    encoded = text.encode("utf-16-le")
    note = f"\n\n... [{size - limit} characters truncated] ...\n\n"
    if not middle:
        note += "Ask for less at a time: a range of lines, a narrower pattern."
    keep = max(0, limit - len(note))
    head, tail = (keep - keep // 2, keep // 2) if middle else (keep, 0)
    # drop half of a surrogate pair
    first = encoded[: 2 * head].decode("utf-16-le", "ignore")
    last = encoded[len(encoded) - 2 * tail :].decode("utf-16-le", "ignore") if tail else ""
    return f"{first}{note}{last}"


class _Live:
    """Delivers the output of Bash calls while they run, by the gateway's events and separate attachments."""

    def __init__(self, tenant: Tenant, on_output: OnOutput) -> None:
        self._tenant = tenant
        self._on_output = on_output
        self._calls: set[str] = set()
        self._starting: dict[str, str] = {}  # call ids by exec, before it has started
        self._followed: dict[str, asyncio.Task[None]] = {}  # by exec
        self._listening: asyncio.Task[None] | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> None:
        stream = self._tenant.events(types=("tool.started", "exec.started"))
        try:
            # entered before any call, so that no event is missed
            await self._stack.enter_async_context(stream)
        except GatewayError as error:
            log.warning("output comes only at a call's end, since there are no events: %s", error.message)
        else:
            self._listening = asyncio.create_task(self._listen(stream))

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._followed.values(), *([self._listening] if self._listening else [])]
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._stack.aclose()

    @contextlib.contextmanager
    def awaiting(self, call: str) -> Iterator[None]:
        """Follow the command of this call as soon as it starts."""
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    async def finish(self, call: str, result: ToolResult) -> None:
        """Wait until all output of an ended command has been delivered."""
        exec_id = result.structured.get("exec")
        if exec_id is None:
            return
        # a short command may have ended before its start event comes; do not follow it then
        following = self._follow(call, str(exec_id))
        self._starting.pop(str(exec_id), None)
        if result.structured.get("status") != "running":
            await asyncio.wait([following], timeout=DRAIN)
        following.add_done_callback(lambda _: self._followed.pop(exec_id, None))

    async def _listen(self, stream: EventStream) -> None:
        try:
            async for event in stream:
                exec_id, call = event.data.get("exec"), event.data.get("callId")
                if event.type == "tool.started" and exec_id and call in self._calls:
                    self._starting[exec_id] = call
                elif event.type == "exec.started" and exec_id in self._starting:
                    self._follow(self._starting.pop(exec_id), exec_id)
        except GatewayError as error:
            log.warning("output comes only at a call's end, since the event stream broke: %s", error.message)

    def _follow(self, call: str, exec_id: str) -> asyncio.Task[None]:
        if exec_id not in self._followed:
            task = asyncio.create_task(self._hand_over(call, exec_id), name=f"output of {exec_id}")
            self._followed[exec_id] = task
        return self._followed[exec_id]

    async def _hand_over(self, call: str, exec_id: str) -> None:
        try:
            async with self._tenant.attach(exec_id) as command:
                try:
                    async for stream, data in command.output():
                        given = self._on_output(Printed(call, stream, data))
                        if isawaitable(given):
                            await given
                except BaseException:
                    await command.detach()  # otherwise leaving would end it
                    raise
        except GatewayError as error:
            log.warning("cannot follow the output of exec %s: %s", exec_id, error.message)
        except Exception:
            log.exception("on_output failed; the rest of the output of exec %s is not delivered", exec_id)
