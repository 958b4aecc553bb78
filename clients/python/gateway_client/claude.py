"""Run an agent of Claude's Agent SDK in a tenant, with the tenant's tools and nothing of this host.

    async with Client("https://gateway.example", token=…) as client:
        async with ClaudeSDKClient(claude.options(client.tenant("shop"))) as agent:
            await agent.query("Make the heading blue.")
            async for message in agent.receive_response():
                print(message)

The SDK runs Claude Code's CLI on this host with all its built-in tools off; the tenant's tools take their
names, also in permission rules and in `can_use_tool`. Needs the extra `claude`. Statements about the CLI here
hold for version 2.1.332.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import isawaitable
from pathlib import Path
from typing import Any, Final, Literal

from gateway_client.errors import GatewayError
from gateway_client.events import EventStream
from gateway_client.extras import needed
from gateway_client.results import ToolResult
from gateway_client.tenant import Tenant

with needed("claude"):
    import aiohttp  # noqa: F401 -- what `on_output` needs: missing, it would fail in a task of the SDK's
    import anyio
    import mcp_types as types
    from claude_agent_sdk import (
        CanUseTool,
        ClaudeAgentOptions,
        HookMatcher,
        PermissionResultAllow,
        PermissionResultDeny,
        PermissionUpdate,
        ToolPermissionContext,
    )
    from mcp import MCPError
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
    "sandbox": "it is for commands on this host, and the agent runs none",
    "add_dirs": "an agent in a tenant must not reach folders of this host",
    "plugins": "plugins run on this host",
    "skills": "skills are files of this host",
    "strict_mcp_config": "servers of this host's configuration would be added",
    "verbatim_prompts": "an @path in a prompt would read a file of this host",
    "max_buffer_size": "it is set for large inputs already",
}
# the options of the SDK that open nothing of this host, or are the caller's own program: an option that a
# newer SDK adds is refused until somebody has looked at it
_PASSED: Final = frozenset(
    {
        *("betas", "cli_path", "client_app", "continue_conversation", "cwd", "debug_stderr", "effort"),
        *("agents", "enable_file_checkpointing", "fallback_model", "fork_session", "forward_subagent_text"),
        *("hooks", "include_hook_events", "include_partial_messages", "load_timeout_ms", "max_budget_usd"),
        *("max_thinking_tokens", "max_turns", "model", "output_format", "permission_mode"),
        *("permission_prompt_tool_name", "resume", "resume_drops_turn", "resume_session_at", "session_id"),
        *("session_store", "session_store_flush", "stderr", "task_budget", "thinking", "user"),
    }
)
# the CLI's arguments that `extra_args` may name: none of them turns on anything
_EXTRA_ARGS: Final = frozenset({"debug-to-stderr", "replay-user-messages"})
_ENVIRONMENT: Final[Mapping[str, str]] = {
    # the tools appear as Read and Bash rather than as mcp__tenant__Read: the names that the model knows
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1",
    "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    # no folder: the CLI would log failed calls there, with their output
    "XDG_CACHE_HOME": "/dev/null",
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

_TOOLS: Final = frozenset({"Bash", "BashOutput", "Edit", "Glob", "Grep", "KillShell", "Read", "Write"})
# what the CLI does without asking, in its working directory
_UNASKED: Final = READ_ONLY | {"BashOutput", "KillShell"}
# tenants, each one tool session, that an agent of this process has worked in
_BEGUN: Final = weakref.WeakSet[Tenant]()
_RULE: Final = re.compile(r"([^\s,()]+)(?:\(((?:\\.|[^\\()])*)\))?(?:[\s,]+|$)")


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
    disallowed_tools: Sequence[str] = (),
    can_use_tool: CanUseTool | None = None,
    extra_args: Mapping[str, str | None] | None = None,
    **more: Any,
) -> ClaudeAgentOptions:
    """Return options for `ClaudeSDKClient` or `query`: the tenant's eight tools, and nothing of this host.

    `on_output` gets the output of Bash while it runs; a slow function slows down the command. It needs a
    token with the scope `events`. `system_prompt` is yours; a sentence about where the tools work follows it.
    `tool_timeout` is in seconds: a call that takes longer is cancelled, with everything that it runs. Further
    options are the SDK's. Raises `ValueError` for those that would open this host.

    The tools run without a question until you say who decides, as in the CLI itself: by `can_use_tool`, a
    `permission_mode`, or rules in `allowed_tools`. Then Read, Glob, Grep, BashOutput and KillShell alone do.
    `disallowed_tools` hold in any case. Rules have the tools' plain names: `Bash`, `Bash(git *)`.

    `bare` keeps even the CLI's description of this host out of the conversation; then the SDK's hooks,
    sub-agents and the modes `plan` and `acceptEdits` do not exist, and only ANTHROPIC_API_KEY is used.
    Without it the model sees the CLI's working directory and platform, and the prompt says that those
    of the container apply.

    `persist_session` has the CLI keep the conversation in the user's folder on this host, so that it can be
    resumed. Then it also stores each image that is read there, and tells the model its path.
    """
    for name in more:
        if name not in _PASSED:
            why = _REFUSED.get(name, "this client does not know whether it would open this host")
            raise ValueError(f"{name} cannot be set for an agent in a tenant: {why}")
    for name in extra_args or {}:
        if name not in _EXTRA_ARGS:
            raise ValueError(
                f"extra_args {name!r} cannot be set for an agent in a tenant: the CLI's arguments can open "
                f"this host, other than {' and '.join(sorted(_EXTRA_ARGS))}"
            )
    agents, hooks = more.pop("agents", None), dict(more.pop("hooks", None) or {})
    mode, prompting = more.get("permission_mode"), more.get("permission_prompt_tool_name")
    if bare:
        for name in [name for name, given in (("hooks", hooks), ("agents", agents)) if given]:
            raise ValueError(f"{name} need bare=False: the CLI has none in its bare mode")
        if mode in ("plan", "acceptEdits"):
            raise ValueError(f"permission_mode {mode!r} needs bare=False: bare mode does not have it")
    if not persist_session and any(more.get(name) for name in _OF_KEPT):
        raise ValueError("only a stored session can be resumed: set persist_session=True, also at its start")
    if SERVER in (mcp_servers or {}):
        raise ValueError(f"the name {SERVER!r} is taken by the tenant's own tools")
    variables = {**os.environ, **(env or {})}
    plans = Path(variables.get("CLAUDE_CONFIG_DIR") or Path(variables.get("HOME", "/"), ".claude")) / "plans"
    permissions = _Permissions(allowed_tools, disallowed_tools, can_use_tool, plans)
    rules = permissions.rules(allowed_tools)
    whole = [name for name, part in rules if part is None]
    if can_use_tool or (permissions.allowed and not prompting):
        more["can_use_tool"] = permissions.ask
    if not (can_use_tool or mode or prompting or _TOOLS & {name for name, _ in rules}):
        whole.append(f"mcp__{SERVER}")
    elif "can_use_tool" not in more or mode == "dontAsk":
        # `ask` allows them otherwise: of tools that it is not asked about the SDK warns
        whole += sorted(_UNASKED)
    if not bare:
        hooks["PreToolUse"] = [*hooks.get("PreToolUse", []), HookMatcher(hooks=[permissions.before])]
    place = _PROMPT.format(workspace=workspace)
    # a conversation that goes on does so where Bash stands
    home = None if any(more.get(name) for name in _OF_KEPT) else workspace
    tools = {"type": "sdk", "name": SERVER, "instance": _server(tenant, on_output, permissions, home)}
    found: dict[str, Any] = {
        # not a user's folder, since the model sees its name
        "cwd": "/",
        **more,
        # those of the CLI that reach nothing of this host, for those who can use them
        "tools": [
            *(["Agent"] if agents else []),
            *(["AskUserQuestion", "ExitPlanMode"] if not bare and (can_use_tool or mode == "plan") else []),
        ],
        "agents": _bounded(agents) if agents else None,
        "hooks": hooks or None,
        # without alwaysLoad the tools would be hidden behind a search if other servers have many
        "mcp_servers": {
            **{name: _cached(server, variables) for name, server in (mcp_servers or {}).items()},
            SERVER: {**tools, "timeout": round(tool_timeout * 1000), "alwaysLoad": True},
        },
        "strict_mcp_config": True,
        "setting_sources": [],
        "skills": [],
        # otherwise the CLI may choose `auto`, which never asks
        "permission_mode": mode or "default",
        "allowed_tools": [_full(rule) for rule in whole],
        "disallowed_tools": permissions.removed,
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


def _full(name: str) -> str:
    """Return the name that the CLI's rules have for a tool."""
    return f"mcp__{SERVER}__{name}" if name in _TOOLS else name


def _plain(name: str) -> str:
    plain = name.removeprefix(f"mcp__{SERVER}__")
    return plain if plain in _TOOLS else name


def _cached(server: Any, variables: Mapping[str, str]) -> Any:
    """Give the caller's own program the cache that the CLI is kept from."""
    if not isinstance(server, Mapping) or "command" not in server:
        return server
    cache = variables.get("XDG_CACHE_HOME") or Path(variables.get("HOME", "/"), ".cache")
    return {**server, "env": {"XDG_CACHE_HOME": str(cache), **(server.get("env") or {})}}


def _bounded(agents: Mapping[str, Any]) -> dict[str, Any]:
    """Return sub-agents that have the tools of the agent, by the same names."""
    bounded = {}
    for name, agent in agents.items():
        if agent.memory is not None or agent.skills is not None:
            raise ValueError(f"the agent {name!r} cannot have memory or skills: they are files of this host")
        for rule in (*(agent.tools or ()), *(agent.disallowedTools or ())):
            if "(" in rule and not rule.startswith(("Agent(", "Task(")):
                raise ValueError(f"the agent {name!r} can have or lack a tool, and not a part of it: {rule}")
        tools, lacks = (
            None if names is None else [_plain(rule) for rule in names]
            for names in (agent.tools, agent.disallowedTools)
        )
        bounded[name] = replace(agent, tools=tools, disallowedTools=lacks)
    return bounded


class _Permissions:
    """Who decides about a call: rules and modes here where the CLI knows none for MCP's tools, then a person.

    The CLI does not match a part of an MCP tool (`Bash(git *)`), nor does it know which of them edit files.
    """

    def __init__(
        self, allowed: Iterable[str], disallowed: Iterable[str], person: CanUseTool | None, plans: Path
    ) -> None:
        self._person = person
        self._plans = plans
        self._plan: dict[str, str] = {}
        self.allowed = [part for _, part in self.rules(allowed) if part is not None]
        rules = self.rules(disallowed)
        self.denied = [part for _, part in rules if part is not None]
        self.removed = [_full(name) for name, part in rules if part is None]

    @staticmethod
    def rules(entries: Iterable[str]) -> list[tuple[str, str | None]]:
        """Return names and parts as the CLI reads them: an entry may hold several. Raises `ValueError`."""
        found: list[tuple[str, str | None]] = []
        for entry in entries:
            at, text = 0, entry.strip()
            while at < len(text):
                rule = _RULE.match(text, at)
                if rule is None:
                    raise ValueError(f"this is no rule of a permission: {entry!r}")
                at, name, part = rule.end(), _plain(rule[1]), rule[2]
                if name not in _TOOLS and part is not None:
                    name, part = f"{name}({part})", None
                elif part in ("", "*", ":*"):
                    part = None
                elif part is not None and name != "Bash":
                    raise ValueError(
                        f"{rule[0].strip()} cannot be held in a tenant: name the whole tool, or "
                        "decide in can_use_tool"
                    )
                found.append((name, part))
        return found

    def refusal(self, name: str, given: Mapping[str, Any]) -> str | None:
        """Return why a call must not run, even if it is allowed elsewhere."""
        command = given.get("command")
        if name == "Bash" and isinstance(command, str):
            for rule in self.denied:
                if any(_matches(rule, part) for part in _any_parts(command)):
                    return f"Permission to use Bash with {rule} has been denied."
        return None

    def allows(self, name: str, given: Mapping[str, Any], mode: str) -> bool:
        """Return whether a call may run without asking."""
        if name in _UNASKED or self._is_plan(name, given):
            return True
        if name in ("Edit", "Write"):
            return mode == "acceptEdits"
        if name != "Bash":
            return False
        parts = _plain_parts(str(given.get("command")))
        return bool(parts) and all(any(_matches(rule, part) for rule in self.allowed) for part in parts)

    async def before(self, event: Any, call: str | None, context: Any) -> Any:
        """A hook, which is the only one to hear of the mode that holds now."""
        name = _plain(event["tool_name"])
        if not self.allows(name, event["tool_input"], event.get("permission_mode", "default")):
            return {}
        return {"hookSpecificOutput": {"hookEventName": "PreToolUse", "permissionDecision": "allow"}}

    async def ask(
        self, name: str, given: dict[str, Any], context: ToolPermissionContext
    ) -> PermissionResultAllow | PermissionResultDeny:
        name = _plain(name)
        if (refusal := self.refusal(name, given)) is not None:
            return PermissionResultDeny(message=refusal)
        if self.allows(name, given, "default"):
            return PermissionResultAllow()
        if self._person is None:
            return PermissionResultDeny(
                message=f"Claude requested permissions to use {name}, but you haven't granted it yet."
            )
        shown = given
        if name == "ExitPlanMode" and self._plan:
            shown = {**given, "plan": [*self._plan.values()][-1]}
        suggestions = [_renamed(update, _plain) for update in context.suggestions]
        answer = await self._person(name, shown, replace(context, suggestions=suggestions))
        if not isinstance(answer, PermissionResultAllow):
            return answer
        if answer.updated_input == shown:  # the CLI would keep a plan that it is given on this host
            answer = replace(answer, updated_input=given)
        return replace(answer, updated_permissions=self._updated(answer.updated_permissions or ()) or None)

    def _updated(self, updates: Iterable[PermissionUpdate]) -> list[PermissionUpdate]:
        """Keep what only we can hold; the rest is the CLI's for this session, and nothing of this host."""
        kept: list[PermissionUpdate] = []
        for update in updates:
            if update.type in ("addDirectories", "removeDirectories"):
                continue
            whole = []
            for rule in update.rules or ():
                name, part = _plain(rule.tool_name), rule.rule_content
                if name != "Bash" or part in (None, "", "*", ":*"):
                    whole.append(rule)
                    continue
                assert part is not None
                held = self.denied if update.behavior == "deny" else self.allowed
                if update.type == "removeRules":
                    held[:] = [one for one in held if one != part]
                elif update.behavior != "ask":
                    held.append(part)
            if whole or not update.rules:
                kept.append(_renamed(replace(update, rules=whole or None, destination="session"), _full))
        return kept

    # --- the plan: a file of the CLI's on this host, which the model writes with the tenant's tools ---------

    def _is_plan(self, name: str, given: Mapping[str, Any]) -> bool:
        path = given.get("file_path")
        return (
            name in ("Edit", "Read", "Write") and isinstance(path, str) and Path(path).parent == self._plans
        )

    def planned(self, name: str, given: Mapping[str, Any]) -> ToolResult | None:
        """Answer a call about the plan, which is kept here; None for any other call."""
        if not self._is_plan(name, given):
            return None
        path = given["file_path"]
        text, wrong = self._plan.get(path), False
        if name == "Write":
            self._plan[path] = given["content"]
            said = f"File created successfully at: {path}"
        elif text is None:
            said, wrong = "File does not exist.", True
        elif name == "Read":
            said = "\n".join(f"{number}\t{line}" for number, line in enumerate(text.split("\n"), 1))
        elif text.count(given["old_string"]) != 1:
            said, wrong = "The plan must hold old_string exactly once.", True
        else:
            self._plan[path] = text.replace(given["old_string"], given["new_string"])
            said = f"The file {path} has been updated successfully."
        return ToolResult([{"type": "text", "text": said}], is_error=wrong)


def _renamed(update: PermissionUpdate, name: Callable[[str], str]) -> PermissionUpdate:
    if not update.rules:
        return update
    rules = [replace(rule, tool_name=name(rule.tool_name)) for rule in update.rules]
    return replace(update, rules=rules)


def _matches(rule: str, command: str) -> bool:
    """Return whether a command is what a rule says: `git *` and `git:*` are git with any words or none."""
    if rule.endswith(":*"):
        rule = f"{rule[:-2]} *"
    head, alone = (rule[:-2], "( .*)?") if rule.endswith(" *") else (rule, "")
    pattern = ".*".join(re.escape(part) for part in head.split("*")) + alone
    return re.fullmatch(pattern, " ".join(command.split()), re.S) is not None


def _plain_parts(command: str) -> list[str]:
    """Return the simple commands of a line of which nothing is hidden; empty if anything might be."""
    quoted = re.sub(r"'[^']*'|\"[^\"$`\\!]*\"", lambda found: "q" * len(found[0]), command)
    if re.search(r"[$`\\<>(){}'\"#!]", quoted):
        return []
    parts, at = [], 0
    for separator in re.finditer(r"[;&|\n]+|$", quoted):
        if part := command[at : separator.start()].strip():
            parts.append(part)
        at = separator.end()
    return parts


# programs and words of the shell behind which a command stands
_RUNS: Final = frozenset(
    {
        *("bash", "builtin", "command", "dash", "do", "doas", "else", "env", "exec", "eval", "if", "ionice"),
        *("nice", "nohup", "setsid", "sh", "stdbuf", "sudo", "then", "time", "timeout", "until", "while"),
        *("xargs", "zsh", "!"),
    }
)


def _any_parts(command: str) -> set[str]:
    """Return all in a line that may be a command, and rather too much: it is for rules that deny."""
    found = {command.strip()}
    for part in re.split(r"[;&|\n(){}`]+", command.replace("\\\n", " ")):
        found.add(part.strip())
        words, option = re.sub(r"[\"'\\]", "", part).split(), False
        while words:
            program = words[0].rpartition("/")[2]
            found |= {" ".join(words), " ".join([program, *words[1:]])}
            # also what stands before the command: options and their values, durations, variables
            if not (option or program in _RUNS or re.match(r"-|[\d.]+[smhd]?$|\w+=", words[0])):
                break
            option = words.pop(0).startswith("-")
    return found


def server(tenant: Tenant, *, on_output: OnOutput | None = None) -> Server[Any]:
    """Return an in-process MCP server with the tenant's tools, for options that you build yourself.

    Read-only tools are marked so that the CLI runs them in parallel. Results have no structuredContent, since
    the CLI would show that to the model instead of the text.
    """
    return _server(tenant, on_output, None, None)


def _server(
    tenant: Tenant, on_output: OnOutput | None, permissions: _Permissions | None, workspace: str | None
) -> Server[Any]:
    """Return the server; with a `workspace`, the first call of a conversation finds Bash there."""
    live = None if on_output is None else _Live(tenant, on_output)
    beginning = asyncio.Lock()
    away = False  # whether Bash may stand where an earlier conversation left it

    @contextlib.asynccontextmanager
    async def lifespan(_: Server[Any]) -> AsyncIterator[None]:
        nonlocal away
        away = workspace is not None and (tenant._connections.named or tenant in _BEGUN)
        _BEGUN.add(tenant)
        async with live or contextlib.nullcontext():
            yield

    async def list_tools(
        context: ServerRequestContext[Any, Any], params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        try:
            return types.ListToolsResult(tools=[_described(tool) for tool in await tenant.tools()])
        except GatewayError as error:  # the CLI goes on without them and reports nothing
            log.error("the agent has none of the tenant's tools: %s", error.message)
            raise MCPError(types.INTERNAL_ERROR, error.message) from None

    async def call_tool(
        context: ServerRequestContext[Any, Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        nonlocal away
        given = params.arguments or {}
        if permissions is not None:
            if (refusal := permissions.refusal(params.name, given)) is not None:
                return _answer(ToolResult([{"type": "text", "text": refusal}], is_error=True))
            if (planned := permissions.planned(params.name, given)) is not None:
                return _answer(planned)
        call_id = (context.meta or {}).get(_CALL_ID)
        call = None if call_id is None else str(call_id)
        try:
            async with beginning:
                if away and workspace is not None:
                    with contextlib.suppress(GatewayError):
                        await _called(tenant, "Bash", {"command": f"cd {shlex.quote(workspace)}"}, None)
                away = False
            with live.awaiting(call) if live and call else contextlib.nullcontext():
                result = await _called(tenant, params.name, given, call)
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
