"""Claude in a tenant: the real Agent SDK and the real CLI that it bundles, a scripted model, real containers.

Each trap of the SDK or the CLI that the adapter knows has its test here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mcp
import pytest
from claude_agent_sdk import (
    ClaudeAgentOptions,
    ClaudeSDKClient,
    HookMatcher,
    ResultMessage,
    create_sdk_mcp_server,
    query,
    tool,
)
from PIL import Image

from gateway.settings import Settings
from gateway_client import Client, Tenant, ToolResult
from gateway_client.claude import Printed, options, server
from tests.constants import constants
from tests.contracts.processes import Tree
from tests.contracts.shells import identified
from tests.integration import environment
from tests.integration.conftest import Container, make_containers
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway
from tests.messages import MODEL, Block, Model, Result, claude, model, say, use
from tests.waits import until

EIGHT = ["Bash", "BashOutput", "Edit", "Glob", "Grep", "KillShell", "Read", "Write"]


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("claude")
    often = constants({"gateway.api.mcp.PROGRESS_INTERVAL": 0.3})
    async with live(incus_settings, folder / "gateway.log", GATEWAY_CANCEL_GRACE="0.5", **often) as gateway:
        yield gateway


@pytest.fixture
async def shop(gateway: LiveGateway, shared_tenant: Container) -> AsyncIterator[Tenant]:
    name = shared_tenant.name
    async with Client(gateway.url, token=gateway.token(name)) as client:
        yield client.tenant(name)


def given(scripted: Model, home: Path, **more: Any) -> dict[str, Any]:
    """Return what the tests' options have in common."""
    home.mkdir(exist_ok=True)
    return {"env": scripted.environment(home), "model": MODEL, **more}


async def converse(
    tenant: Tenant, home: Path, *turns: Sequence[Block], prompt: str = "go on", **more: Any
) -> tuple[Model, ResultMessage]:
    """Let the scripted model say its turns to a real agent; return both ends of the talk."""
    async with asyncio.timeout(60), model(*turns) as scripted:
        async for message in query(prompt=prompt, options=options(tenant, **given(scripted, home, **more))):
            if isinstance(message, ResultMessage):
                return scripted, message
    raise AssertionError("there was no result")


async def test_an_agent_reads_edits_searches_runs_and_kills(shop: Tenant, tmp_path: Path) -> None:
    """The model's names and texts, the session's working directory, one call once, whatever it returns."""
    tree = Tree()
    write = use("Write", file_path="agent/a.txt", content="one\ntwo\n")
    read = use("Read", file_path="agent/a.txt")
    edit = use("Edit", file_path="agent/a.txt", old_string="two", new_string="three")
    grep = use("Grep", pattern="thr", output_mode="content", path="agent")
    glob = use("Glob", pattern="agent/*.txt")
    moved = use("Bash", command="cd agent && cat a.txt")
    there = use("Bash", command="pwd; exit 3")
    behind = use("Bash", command=tree.script, run_in_background=True)
    wrong = use("Read", file_path="agent/none.txt")
    calls = (write, read, edit, grep, glob, moved, there, behind, wrong)
    async with shop.events(types="tool.started") as stream:
        scripted, ended = await converse(shop, tmp_path, *([one] for one in calls))
        started: list[str] = []
        while len(started) < len(calls):
            told = (await anext(stream)).data["callId"]
            started += [told] if told in scripted.results else []  # others work in the tenant too
    assert ended.subtype == "success"
    said = [scripted.result(one) for one in calls]
    assert "created successfully at: agent/a.txt" in said[0].text
    assert said[1].text == "1\tone\n2\ttwo\n3\t"
    assert "has been updated successfully" in said[2].text
    assert said[3].text == "agent/a.txt:2:three"
    assert said[4].text == "agent/a.txt"
    assert said[5].text == "one\nthree"
    assert (said[6].is_error, said[6].text) == (True, "Exit code 3\n/srv/site/agent")
    assert said[8].is_error and "File does not exist" in said[8].text
    # the model's id of a call is the gateway's
    assert started == list(scripted.results)
    await tree.grown()
    shell_id = identified(said[7].text)
    output, kill = use("BashOutput", bash_id=shell_id), use("KillShell", shell_id=shell_id)
    scripted, _ = await converse(shop, tmp_path, [output], [kill])
    assert "<status>running</status>" in scripted.result(output).text
    assert "ready" in scripted.result(output).text
    assert "Successfully killed" in scripted.result(kill).text
    assert tree.alive() == 0


@pytest.mark.parametrize("bare", [True, False])
async def test_nothing_of_the_agents_host_is_told_or_offered(
    shop: Tenant, tmp_path: Path, bare: bool
) -> None:
    """Eight tools under their own names and none of the CLI's; no file, setting or name of this host.

    Not by a mention in the prompt, by memory files, by settings and servers of the folder or the user. Only
    the CLI's own working directory is told where it is not bare, and the prompt says what counts.
    """
    home, folder = tmp_path / "home", tmp_path / "folder-of-the-host"
    for place in (home / ".claude", folder / ".claude"):
        place.mkdir(parents=True)
        (place / "settings.json").write_text(
            json.dumps({"hooks": {"PreToolUse": [{"hooks": [{"type": "command", "command": "exit 2"}]}]}})
        )
    for memory in (home / ".claude/CLAUDE.md", folder / "CLAUDE.md", folder / "CLAUDE.local.md"):
        memory.write_text("MARKED-MEMORY")
    theirs = {"type": "stdio", "command": "touch", "args": [str(tmp_path / "started")]}
    (folder / ".mcp.json").write_text(json.dumps({"mcpServers": {"theirs": theirs}}))
    (folder / "notes.txt").write_text("MARKED-FILE")
    (tmp_path / "secret.txt").write_text("MARKED-SECRET")
    call, foreign = use("Bash", command="echo $HOME; hostname"), use("WebFetch", url="x", prompt="y")
    scripted, ended = await converse(
        shop,
        home,
        [call],
        [foreign],
        prompt=f"look at @notes.txt and @{tmp_path}/secret.txt and /init",
        cwd=folder,
        system_prompt="You are a builder of shops.",
        bare=bare,
    )
    assert ended.subtype == "success"
    assert sorted(tool["name"] for tool in scripted.requests[0]["tools"]) == EIGHT
    assert scripted.result(call).text.split()[:2] == ["/home/site", shop.name]
    assert "No such tool available: WebFetch" in scripted.result(foreign).text
    for mark in ("MARKED", "theirs", socket.gethostname(), "Read tool with the following input"):
        assert mark not in scripted.heard.replace(str(tmp_path), ""), mark
    assert (folder.name in scripted.heard) is (not bare)
    assert not (tmp_path / "started").exists()
    system = json.dumps(scripted.requests[0]["system"])
    assert (
        "You are a builder of shops." in system and "this one counts. The project lies in /srv/site" in system
    )


async def test_the_tools_are_there_at_once_beside_the_clis_own_and_a_server_with_many(
    shop: Tenant, tmp_path: Path
) -> None:
    """Where its own are on, the CLI hides servers' tools behind a search; not the tenant's."""

    @tool("look_up", "looks something up", {"word": str})
    async def look_up(given: dict[str, Any]) -> dict[str, Any]:
        return {"content": [{"type": "text", "text": "found"}]}

    many = [replace(look_up, name=f"look_up_{number}") for number in range(40)]
    servers: Any = {
        "others": create_sdk_mcp_server("others", tools=many),
        "shop": {"type": "sdk", "name": "shop", "instance": server(shop)},
    }
    call = use("mcp__shop__Bash", command="echo here")
    async with asyncio.timeout(60), model([call]) as scripted:
        alone = ClaudeAgentOptions(
            mcp_servers=servers,
            allowed_tools=["mcp__shop"],
            setting_sources=[],
            **given(scripted, tmp_path),
        )
        async for _ in query(prompt="go", options=alone):
            pass
    assert scripted.result(call).text.startswith("here")
    first = {entry["name"] for entry in scripted.requests[0]["tools"] if not entry.get("defer_loading")}
    assert {f"mcp__shop__{name}" for name in EIGHT} <= first
    assert not any("look_up" in name for name in first), "those of others are searched for"


async def test_an_interrupt_before_the_first_message_leaves_the_session_usable(
    shop: Tenant, tmp_path: Path
) -> None:
    """The CLI takes no notice of one before its `init`: what was asked is done, and nothing hangs."""
    call, after = use("Bash", command="echo begun"), use("Bash", command="echo on")
    async with asyncio.timeout(60), model([call], [say("well")], [after]) as scripted:
        async with ClaudeSDKClient(options(shop, **given(scripted, tmp_path))) as agent:
            await agent.interrupt()
            for asked in ("go", "go on"):
                await agent.query(asked)
                ended = [one async for one in agent.receive_response() if isinstance(one, ResultMessage)]
                assert [one.subtype for one in ended] == ["success"]
    assert (scripted.result(call).text, scripted.result(after).text) == ("begun", "on")


async def test_an_interrupt_ends_the_commands_whole_tree_and_the_session_goes_on(
    shop: Tenant, tmp_path: Path
) -> None:
    tree = Tree()
    call, after = use("Bash", command=tree.script), use("Bash", command="echo on")
    async with asyncio.timeout(60), model([call], [after]) as scripted:
        async with ClaudeSDKClient(options(shop, **given(scripted, tmp_path))) as agent:
            await agent.query("go")
            await tree.grown()
            await agent.interrupt()
            ended = [one async for one in agent.receive_response() if isinstance(one, ResultMessage)]
            assert ended[0].subtype == "error_during_execution"
            await until(lambda: tree.alive() == 0)
            await agent.query("go on")
            ended = [one async for one in agent.receive_response() if isinstance(one, ResultMessage)]
            assert ended[0].subtype == "success"
            assert scripted.result(call).is_error
            assert scripted.result(after).text == "on"


async def test_a_call_that_takes_too_long_is_given_up_with_its_tree(shop: Tenant, tmp_path: Path) -> None:
    tree = Tree()
    call, after = use("Bash", command=tree.script), use("Bash", command="echo on")
    scripted, ended = await converse(shop, tmp_path, [call], [after], tool_timeout=1.5)
    assert ended.subtype == "success"
    assert "timed out" in scripted.result(call).text and scripted.result(call).is_error
    assert scripted.result(after).text == "on"
    await until(lambda: tree.alive() == 0)


async def test_an_agent_that_leaves_takes_its_command_along(shop: Tenant, tmp_path: Path) -> None:
    tree = Tree()
    async with asyncio.timeout(60), model([use("Bash", command=tree.script)]) as scripted:
        async with ClaudeSDKClient(options(shop, **given(scripted, tmp_path))) as agent:
            await agent.query("go")
            await tree.grown()
        await until(lambda: tree.alive() == 0)


async def test_two_megabytes_are_written_and_an_image_is_seen(shop: Tenant, tmp_path: Path) -> None:
    """The SDK's own limit of 1 MiB on a message would end the session."""
    content = "".join(f"{number:063}\n" for number in range(32_768))
    data = io.BytesIO()
    Image.new("RGB", (32, 16), (200, 30, 30)).save(data, "PNG")
    await shop.files.write("red.png", data.getvalue())
    write = use("Write", file_path="big.txt", content=content)
    summed, read = use("Bash", command="sha256sum <big.txt"), use("Read", file_path="red.png")
    scripted, ended = await converse(shop, tmp_path, [write], [summed], [read])
    assert ended.subtype == "success" and len(content) == 2 << 20
    assert scripted.result(summed).text.split()[0] == hashlib.sha256(content.encode()).hexdigest()
    # nor is the model told where on this host the CLI would keep the image: it keeps none
    assert scripted.result(read).text == "" and str(tmp_path) not in scripted.heard
    assert not list((tmp_path / ".claude").rglob("*.png"))
    (image,) = scripted.result(read).others
    seen = Image.open(io.BytesIO(base64.b64decode(image["source"]["data"]))).convert("RGB")
    assert (seen.size, seen.getpixel((5, 5))) == ((32, 16), (200, 30, 30))


async def test_results_are_cut_by_us_within_the_clis_limits(shop: Tenant, tmp_path: Path) -> None:
    """What is longer the CLI would write to a file of this host, and show a path that no tool can read."""
    await shop.files.write("long.txt", "".join(f"{number} 𝄞{'ä' * 60}\n" for number in range(10_000)))
    large = use("Grep", pattern="ä", path="long.txt", output_mode="content", head_limit=0)
    failed = use("Edit", file_path="long.txt", old_string="x" * 30_000, new_string="y")
    scripted, _ = await converse(shop, tmp_path, [large], [failed])
    said = scripted.result(large)
    assert not said.is_error and "characters truncated] ..." in said.text
    assert "Ask for less at a time" in said.text and said.text.startswith("1:0 𝄞ä")
    assert 480_000 < len(said.text.encode("utf-16-le")) // 2 <= 490_000
    error = scripted.result(failed)
    assert error.is_error and 9_900 < len(error.text) <= 10_000
    assert error.text.startswith("<tool_use_error>String to replace not found")
    assert error.text.count("truncated]") == 1 and error.text.endswith("x</tool_use_error>")
    assert "persisted-output" not in scripted.heard and "saved to" not in scripted.heard


async def test_twelve_reads_of_one_turn_run_at_once(
    shop: Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They all wait for each other; what is not marked as reading only runs alone."""
    for number in range(12):
        await shop.write(f"many/{number}.txt", f"number {number}\n")
    together, running, most = asyncio.Barrier(12), 0, 0
    real = shop.tool

    async def tool(name: str, arguments: Any, call_id: str | None = None) -> ToolResult:
        nonlocal running, most
        if name == "Read":
            async with asyncio.timeout(20):
                await together.wait()
            return await real(name, arguments, call_id)
        running += 1
        most = max(most, running)
        try:
            return await real(name, arguments, call_id)
        finally:
            running -= 1

    monkeypatch.setattr(shop, "tool", tool)
    reads = [use("Read", file_path=f"many/{number}.txt") for number in range(12)]
    runs = [use("Bash", command="sleep 0.1") for _ in range(3)]
    scripted, _ = await converse(shop, tmp_path, reads, runs)
    texts = [scripted.result(read).text for read in reads]
    assert texts == [f"1\tnumber {number}\n2\t" for number in range(12)]
    assert most == 1


async def test_output_comes_while_the_command_runs(shop: Tenant, tmp_path: Path) -> None:
    """The command ends only once its first line was handed over; a short one is handed over too."""
    heard: list[Printed] = []

    async def on_output(printed: Printed) -> None:
        heard.append(printed)
        if b"one" in printed.data:
            await shop.write("go.txt", "go")
        if printed.call == behind["id"]:  # what is heard after the agent's end is no more handed over
            await shop.write("end.txt", "go")

    def until_there(name: str) -> str:
        return f"until [ -e {name} ]; do sleep 0.05; done"

    waits = use("Bash", command=f"rm -f *.txt; echo one; {until_there('go.txt')}; echo two")
    short, behind = use("Bash", command="echo short"), use("Bash", command="echo b", run_in_background=True)
    last = use("Bash", command=until_there("end.txt"))
    scripted, _ = await converse(shop, tmp_path, [waits], [short], [behind], [last], on_output=on_output)
    assert scripted.result(waits).text == "one\ntwo"

    def said(call: Block) -> bytes:
        return b"".join(printed.data for printed in heard if printed.call == call["id"])

    assert said(waits) == b"one\ntwo\n"
    assert said(short) == b"short\n"
    assert said(behind) == b"b\n"


async def test_a_callback_that_fails_harms_no_command(shop: Tenant) -> None:
    def on_output(printed: Printed) -> None:
        raise ZeroDivisionError

    meta: Any = {"claudecode/toolUseId": "toolu_failing"}
    async with mcp.Client(server(shop, on_output=on_output)) as host:
        said = await host.call_tool("Bash", {"command": "echo one; sleep 0.3; echo two"}, meta=meta)
    assert isinstance(said.content[0], mcp.types.TextContent)
    assert said.content[0].text == "one\ntwo"


async def test_sessions_of_two_tenants_do_not_see_each_other(
    gateway: LiveGateway, incus_settings: Settings, tmp_path: Path
) -> None:
    """Two agents of one process at the same time; a token for both would not mix them either."""
    async with make_containers("claude", incus_settings, 2) as containers:
        names = [container.name for container in containers]

        async def talk(number: int, tenant: Tenant) -> list[str]:
            calls = [
                use("Write", file_path="mine.txt", content=f"of {number}"),
                use("Bash", command="sleep 0.2; hostname; ls"),
                use("Read", file_path="mine.txt"),
            ]
            scripted, _ = await converse(tenant, tmp_path / str(number), *([call] for call in calls))
            return [scripted.result(call).text for call in calls[1:]]

        async with Client(gateway.url, token=gateway.token(*names)) as client:
            tenants = [client.tenant(name) for name in names]
            said = await asyncio.gather(*(talk(number, one) for number, one in enumerate(tenants)))
        assert said == [[f"{name}\nmine.txt", f"1\tof {number}"] for number, name in enumerate(names)]


async def test_hooks_run_where_it_is_not_bare(shop: Tenant, tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    async def before(event: Any, call: str | None, context: Any) -> Any:
        seen.append((event["tool_name"], str(call)))
        return {}

    call = use("Read", file_path="none.txt")
    await converse(shop, tmp_path, [call], bare=False, hooks={"PreToolUse": [HookMatcher(hooks=[before])]})
    assert [(name.rpartition("__")[2], told) for name, told in seen] == [("Read", call["id"])]


async def test_a_tenant_that_is_away_is_told_to_the_model(
    gateway: LiveGateway, tenant: Container, tmp_path: Path
) -> None:
    token = gateway.token(tenant.name)
    async with Client(gateway.url, token=token) as client:
        shop = client.tenant(tenant.name)
        await asyncio.to_thread(environment.incus, "stop", "--force", tenant.name)
        call = use("Bash", command="true")
        scripted, ended = await converse(shop, tmp_path, [call])
    assert ended.subtype == "success"
    assert scripted.result(call).is_error and "is stopped; start it first" in scripted.result(call).text


# --- Claude Code by itself, over MCP ------------------------------------------------------------------

# by itself it speaks 2026-07-28, which has no sessions
BOTH = pytest.mark.parametrize("negotiation", ["auto", "legacy"])


def configured(gateway: LiveGateway, tenant: str, **headers: str) -> tuple[str, ...]:
    """Return the words that give the CLI the tenant as its one server, `shop`."""
    headers = {"Authorization": f"Bearer {gateway.token(tenant)}", **headers}
    shop = {"type": "http", "url": f"{gateway.url}/v1/tenants/{tenant}/mcp", "headers": headers}
    servers = json.dumps({"mcpServers": {"shop": shop}})
    return (
        "-p",
        "go",
        "--model",
        MODEL,
        "--allowedTools",
        "mcp__shop",
        "--mcp-config",
        servers,
        "--strict-mcp-config",
    )


@BOTH
async def test_claude_code_works_in_a_tenant_over_mcp(
    gateway: LiveGateway, shared_tenant: Container, tmp_path: Path, negotiation: str
) -> None:
    """The real CLI with an `http` server, in both protocols: texts, not facts; a named session."""
    name = f"code-{negotiation}"
    write = use("mcp__shop__Write", file_path=f"{name}/a.txt", content="one\ntwo\n")
    read = use("mcp__shop__Read", file_path=f"{name}/a.txt")
    move = use("mcp__shop__Bash", command=f"cd {name}")
    there = use("mcp__shop__Bash", command="pwd; exit 3")
    words = configured(gateway, shared_tenant.name, **{"X-Tool-Session": name})
    async with model([write], [read], [move], [there]) as scripted:
        printed = await claude(scripted, tmp_path, *words, MCP_PROTOCOL_NEGOTIATION=negotiation)
        assert printed.strip() == "done"
        # the CLI adds a reminder after what a tool said
        assert scripted.result(read).text.startswith("1\tone\n2\ttwo\n3\t")
        assert scripted.result(there).text.startswith(f"Exit code 3\n/srv/site/{name}")


@BOTH
async def test_claude_code_has_a_session_of_its_own_only_in_the_handshake_protocol(
    gateway: LiveGateway, shared_tenant: Container, tmp_path: Path, negotiation: str
) -> None:
    """So one sees which of the two it speaks; progress that is told while a command runs does it no harm."""
    move, there = (use("mcp__shop__Bash", command=command) for command in ("cd public; sleep 1", "pwd"))
    shared_tenant.sh("mkdir -p /srv/site/public", user=1000)
    async with model([move], [there]) as scripted:
        words = configured(gateway, shared_tenant.name)
        await claude(scripted, tmp_path, *words, MCP_PROTOCOL_NEGOTIATION=negotiation)
        assert not scripted.result(move).is_error, scripted.result(move).text
        stood = {"auto": "/srv/site", "legacy": "/srv/site/public"}[negotiation]
        assert scripted.result(there).text.split()[0] == stood


@pytest.fixture(scope="module", autouse=True)
async def long_talks(
    request: pytest.FixtureRequest,
    gateway: LiveGateway,
    shared_tenant: Container,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[dict[str, asyncio.Task[Result]]]:
    """Calls that take longer than the CLI waits for a silent server, which run beside the other tests.

    The CLI looks every 30 seconds whether anything came (seen with 2.1.332), so that they must take longer.
    """

    async def talk(negotiation: str, home: Path) -> Result:
        call = use("mcp__shop__Bash", command="sleep 34; echo done at last")
        async with model([call]) as scripted:
            await claude(
                scripted,
                home,
                *configured(gateway, shared_tenant.name),
                MCP_PROTOCOL_NEGOTIATION=negotiation,
                CLAUDE_CODE_MCP_TOOL_IDLE_TIMEOUT="10000",
            )
            return scripted.result(call)

    asked = (item.name.partition("[") for item in request.session.items)
    words = [
        word.rstrip("]")
        for name, _, word in asked
        if name == test_progress_keeps_a_long_call_of_claude_code_alive.__name__
    ]
    talks = {word: asyncio.create_task(talk(word, tmp_path_factory.mktemp(word))) for word in words}
    yield talks
    for task in talks.values():
        task.cancel()
    await asyncio.gather(*talks.values(), return_exceptions=True)


@BOTH
async def test_claude_code_that_is_ended_takes_its_command_along(
    gateway: LiveGateway, shared_tenant: Container, tmp_path: Path, negotiation: str
) -> None:
    tree = Tree()
    async with model([use("mcp__shop__Bash", command=tree.script), say("never")]) as scripted:
        words = configured(gateway, shared_tenant.name)
        talking = asyncio.create_task(
            claude(scripted, tmp_path, *words, MCP_PROTOCOL_NEGOTIATION=negotiation)
        )
        await tree.grown()
        talking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await talking
        await until(lambda: tree.alive() == 0, 20)


@BOTH
async def test_progress_keeps_a_long_call_of_claude_code_alive(
    long_talks: dict[str, asyncio.Task[Result]], negotiation: str
) -> None:
    said = await long_talks[negotiation]
    assert said.text.startswith("done at last"), said
