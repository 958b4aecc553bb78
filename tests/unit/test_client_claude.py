"""The Claude adapter alone: what its options refuse, and how results are cut."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import mcp
import pytest
from claude_agent_sdk import AgentDefinition, ClaudeAgentOptions

from gateway_client import Client, ToolResult, claude
from gateway_client.errors import Unavailable
from gateway_client.events import Event
from tests.waits import turn


@pytest.mark.parametrize(
    "more",
    [
        {"tools": ["Read"]},
        {"setting_sources": ["user"]},
        {"settings": "{}"},
        {"add_dirs": ["/"]},
        {"plugins": [{"type": "local", "path": "/x"}]},
        {"skills": "all"},
        {"strict_mcp_config": False},
        {"verbatim_prompts": False},
        {"hooks": {"Stop": []}, "mcp_servers": {"tenant": {}}},
        {"mcp_servers": {"tenant": {"type": "http", "url": "http://x"}}},
        {"hooks": {"Stop": [object()]}},
        {"resume": "5f0c"},
        {"continue_conversation": True},
        {"sandbox": {"enabled": True}},
        {"an_option_of_tomorrow": True},
        {"extra_args": {"tools": "default"}},
        {"extra_args": {"mcp-config": "{}"}},
        {"extra_args": {"debug-to-stderr": None, "add-dir": "/"}},
        {"agents": {"tester": AgentDefinition("d", "p")}},
        {"permission_mode": "plan"},
        {"permission_mode": "acceptEdits"},
        {"disallowed_tools": ["Read(secrets/**)"]},
        {"allowed_tools": ["Bash(git"]},
        {"agents": {"tester": AgentDefinition("d", "p", memory="user")}, "bare": False},
        {"agents": {"tester": AgentDefinition("d", "p", tools=["Bash(git *)"])}, "bare": False},
    ],
)
async def test_what_would_open_the_agents_host_is_refused(more: dict[str, Any]) -> None:
    words = r"cannot be (set|held)|is taken|bare=False|persist_session=True|no rule|cannot have|not a part"
    async with Client("http://127.0.0.1:9", token="t") as client:
        with pytest.raises(ValueError, match=words):
            claude.options(client.tenant("shop"), **more)


async def test_that_there_are_no_tools_is_told_since_the_cli_goes_on_without_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Client("http://127.0.0.1:9", token="t") as client:
        async with mcp.Client(claude.server(client.tenant("shop"))) as agent:
            with pytest.raises(mcp.MCPError, match="no gateway answers"):
                await agent.list_tools()
    (said,) = [one for one in caplog.records if one.levelname != "INFO"]
    assert said.exc_info is None
    assert "the agent has none of the tenant's tools: no gateway answers" in said.getMessage()


async def test_what_is_the_callers_own_is_kept_and_what_holds_the_host_shut_wins() -> None:
    async with Client("http://127.0.0.1:9", token="t") as client:
        found = claude.options(
            client.tenant("shop"),
            model="claude-opus-5",
            env={"A": "b", "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "0", "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "0"},
            mcp_servers={"search": {"type": "http", "url": "http://x"}},
            allowed_tools=["mcp__search"],
            extra_args={"debug-to-stderr": None},
            tool_timeout=12.5,
        )
    assert (found.model, found.tools, found.setting_sources) == ("claude-opus-5", [], [])
    assert found.env["A"] == "b" and found.env["XDG_CACHE_HOME"] == "/dev/null"
    # what CI cannot see gone: without setting sources the CLI read no CLAUDE.md of the host either
    names = ("FILE_MENTIONS", "CLAUDE_MDS", "AUTO_MEMORY")
    for name in ("CLAUDE_AGENT_SDK_MCP_NO_PREFIX", *(f"CLAUDE_CODE_DISABLE_{name}" for name in names)):
        assert found.env[name] == "1"
    assert isinstance(found.mcp_servers, dict) and set(found.mcp_servers) == {"search", "tenant"}
    assert dict(found.mcp_servers["tenant"])["timeout"] == 12_500
    assert found.allowed_tools == ["mcp__search", "mcp__tenant"]
    assert found.extra_args == {"debug-to-stderr": None, "bare": None, "no-session-persistence": None}


async def test_a_conversation_can_be_kept_and_resumed() -> None:
    async with Client("http://127.0.0.1:9", token="t") as client:
        found = claude.options(client.tenant("shop"), persist_session=True, resume="5f0c", bare=False)
    assert (found.resume, found.extra_args) == ("5f0c", {})


def test_each_option_of_the_sdk_is_passed_or_refused() -> None:
    """Of a newer one too: until somebody has looked at it, an option is refused."""
    ours = {
        "allowed_tools",
        "can_use_tool",
        "disallowed_tools",
        "env",
        "extra_args",
        "mcp_servers",
        "system_prompt",
    }
    options = {field.name for field in dataclasses.fields(ClaudeAgentOptions)}
    assert options - ours - claude._PASSED == claude._REFUSED.keys()


async def test_a_server_of_the_callers_keeps_its_cache() -> None:
    servers = {
        "a": {"command": "uvx", "env": {"X": "y"}},
        "b": {"command": "z", "env": {"XDG_CACHE_HOME": "/c"}},
    }
    async with Client("http://127.0.0.1:9", token="t") as client:
        found = claude.options(client.tenant("shop"), mcp_servers=servers, env={"HOME": "/home/me"})
    assert isinstance(found.mcp_servers, dict)
    environments = [dict(found.mcp_servers[name])["env"] for name in servers]
    assert environments == [{"XDG_CACHE_HOME": "/home/me/.cache", "X": "y"}, {"XDG_CACHE_HOME": "/c"}]


RULES = json.loads((Path(__file__).parents[1] / "data" / "claude_rules.json").read_text())


@pytest.mark.parametrize(("rule", "command", "runs"), RULES["allowed"])
def test_a_rule_allows_what_it_surely_says(rule: str, command: str, runs: bool) -> None:
    """Read by clients/typescript/tests/claude.test.ts too, as the next."""
    permissions = claude._Permissions([f"Bash({rule})"], [], None, Path("/plans"))
    assert permissions.allows("Bash", {"command": command}, "default") is runs


@pytest.mark.parametrize(("rule", "command", "denied"), RULES["denied"])
def test_a_rule_denies_what_it_may_say(rule: str, command: str, denied: bool) -> None:
    permissions = claude._Permissions([], [f"Bash({rule})"], None, Path("/plans"))
    assert (permissions.refusal("Bash", {"command": command}) is not None) is denied


@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize("letter", ["x", "ä", "𝄞"])
@pytest.mark.parametrize("size", [0, 999, 1000, 1001, 50_000])
def test_a_text_is_cut_to_its_limit_in_utf_16_and_never_in_a_pair(
    letter: str, size: int, middle: bool
) -> None:
    text = letter * size
    cut = claude._cut(text, 1000, middle=middle)
    assert len(cut.encode("utf-16-le")) // 2 <= 1000
    if len(text.encode("utf-16-le")) // 2 <= 1000:
        assert cut == text
    else:
        assert "characters truncated] ..." in cut and cut.startswith(letter) and "�" not in cut
        assert cut.endswith(letter) is middle


def test_a_whole_pdf_is_not_put_on_the_agents_host_and_the_model_is_told() -> None:
    """The CLI would write an embedded file to a folder of its host and show the model that path alone."""
    resource = {"uri": "file:///srv/site/a.pdf", "mimeType": "application/pdf", "blob": "JVBERi0="}
    said = {"type": "text", "text": "PDF file read: /srv/site/a.pdf (5 bytes)"}
    answer = claude._answer(ToolResult([said, {"type": "resource", "resource": resource}]))
    (shown,) = (part.get("text") for part in answer.model_dump()["content"])
    assert answer.is_error and "cannot be shown" in shown and "`pdf`" in shown
    assert "JVBERi0=" not in answer.model_dump_json()


async def test_a_start_that_is_told_late_hands_nothing_over_twice() -> None:
    """The result of a short command may come before its `exec.started`; then it has been followed already."""
    late, followed = asyncio.Event(), list[str]()

    class Stream:
        async def __aenter__(self) -> Stream:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def __aiter__(self) -> AsyncIterator[Event]:
            data = {"exec": "x-1", "callId": "toolu_1"}
            yield event("tool.started", data)
            told.set()
            await late.wait()
            yield event("exec.started", data)
            over.set()

    class Shop:
        def events(self, types: object) -> Stream:
            return Stream()

        def attach(self, exec_id: str) -> Any:
            followed.append(exec_id)
            raise Unavailable("as good as over")

    told, over = asyncio.Event(), asyncio.Event()
    live = claude._Live(cast("Any", Shop()), lambda printed: None)
    async with live:
        with live.awaiting("toolu_1"):
            await told.wait()
        await live.finish("toolu_1", ToolResult([], structured={"exec": "x-1", "status": "completed"}))
        await turn()  # what was followed is forgotten
        late.set()
        await over.wait()
    assert followed == ["x-1"]


def event(kind: str, data: dict[str, Any]) -> Event:
    return Event(1, kind, "shop", "", "/gateway/test", data)
