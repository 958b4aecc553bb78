"""What a person, a rule or a mode decides about an agent's calls: the real Agent SDKs and the real CLI.

Over the `local` runtime, since no container is asked what may run in it. Each case is one conversation, by
Python and by TypeScript.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import (
    AgentDefinition,
    ClaudeSDKClient,
    PermissionResultAllow,
    PermissionResultDeny,
    PermissionUpdate,
)

from gateway_client import Client
from gateway_client.claude import options
from tests.integration.test_claude_typescript import agent
from tests.live import LiveGateway, local_gateway
from tests.messages import MODEL, Block, Model, model, say, use
from tests.typescript import installed

ECHO = {"toolName": "Bash", "ruleContent": "echo *"}
ALWAYS = {"type": "addRules", "rules": [ECHO], "behavior": "allow", "destination": "localSettings"}
NO = "the person said no"
UNGRANTED = "haven't granted it yet"


@dataclass
class Case:
    """Options, what the person allows, the model's calls each with a piece of its result, who is asked."""

    options: Mapping[str, Any]
    calls: Sequence[tuple[Block, str]]
    person: Mapping[str, Any] | None = None
    asked: Sequence[str] = ()
    tools: Sequence[str] = ()  # beside the eight, or less of them


def echo(word: str = "ran") -> Block:
    return use("Bash", command=f"echo {word}")


def write(path: str = "w.txt") -> Block:
    return use("Write", file_path=path, content="1. build\n")


READ = use("Read", file_path="none.txt")
GONE = "rm -f precious; echo gone"
HELP = use("Agent", subagent_type="tester", description="d", prompt="look", run_in_background=False)
HELPER = {"description": "tests", "prompt": "You test.", "tools": ["Read", "Bash"]}

CASES = {
    "nobody is asked where nobody is named": Case(
        {}, [(echo(), "ran"), (write(), "successfully"), (READ, "does not exist")]
    ),
    "what a person denies does not run": Case(
        {},
        [(echo(), NO), (write("denied.txt"), NO), (READ, "does not exist")],
        person={},
        asked=["Bash", "Write"],
    ),
    "what a person allows runs": Case({}, [(echo(), "ran"), (write(), NO)], {"Bash": {}}, ["Bash", "Write"]),
    "what a person allows for ever is not asked again": Case(
        {},
        [(echo("one"), "one"), (echo("two"), "two"), (use("Bash", command="echo x > y"), "no output")],
        {"Bash": {"updatedPermissions": [ALWAYS]}},
        ["Bash", "Bash"],
    ),
    "a tool that is disallowed is not there": Case(
        {"disallowed_tools": ["Bash, Edit"]},
        [(echo(), "No such tool available: Bash"), (write(), "successfully")],
        tools=["-Bash", "-Edit"],
    ),
    "a part that is disallowed does not run, whoever allows it": Case(
        {"disallowed_tools": ["Bash(rm *)"]},
        [
            (echo(), "ran"),
            (use("Bash", command=GONE), "has been denied"),
            (use("Bash", command="bash -c 'rm x'"), "has been denied"),
        ],
        {"Bash": {}},
        ["Bash"],
    ),
    "a part that is allowed runs, and no other": Case(
        {"allowed_tools": ["Bash(echo *)"]},
        [(echo(), "ran"), (use("Bash", command="echo x && rm y"), UNGRANTED), (write(), UNGRANTED)],
    ),
    "in dontAsk what is not allowed is denied": Case(
        {"permission_mode": "dontAsk", "allowed_tools": ["Write"]},
        [(echo(), "don't ask mode"), (write(), "successfully"), (READ, "does not exist")],
    ),
    "without anybody to ask the default mode denies": Case(
        {"permission_mode": "default"}, [(echo(), UNGRANTED), (READ, "does not exist")]
    ),
    "acceptEdits accepts edits alone": Case(
        {"permission_mode": "acceptEdits", "bare": False},
        [(write(), "successfully"), (echo(), NO)],
        person={},
        asked=["Bash"],
        tools=["AskUserQuestion", "ExitPlanMode"],
    ),
    "plan mode shows its plan and ends": Case(
        {"permission_mode": "plan", "bare": False},
        [
            (write("early.txt"), NO),
            (write("PLANS/a-b.md"), "created successfully"),
            (
                use("Edit", file_path="PLANS/a-b.md", old_string="build", new_string="build it"),
                "updated successfully",
            ),
            (use("Read", file_path="PLANS/a-b.md"), "1\t1. build it"),
            (use("ExitPlanMode"), "approved"),
            (echo(), "ran"),
        ],
        {"ExitPlanMode": {}, "Bash": {}},
        ["Write", "ExitPlanMode", "Bash"],
        ["AskUserQuestion", "ExitPlanMode"],
    ),
    "a sub-agent has its tools, and its person": Case(
        {"agents": {"tester": HELPER}, "bare": False, "disallowed_tools": ["Bash(rm *)"]},
        [(HELP, "seen"), (use("Bash", command=GONE), "has been denied"), (echo(), NO), (say("seen"), "")],
        person={},
        asked=["Bash"],
        tools=["Agent", "AskUserQuestion", "ExitPlanMode"],
    ),
}


@dataclass
class Talk:
    scripted: Model
    asked: list[Mapping[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path_factory.mktemp("state"), "shop")
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0


@pytest.fixture(scope="module")
async def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return await installed(tmp_path_factory.mktemp("agent"), "tests/agent.js")


async def by_python(case: Case, gateway: LiveGateway, scripted: Model, home: Path) -> Talk:
    talk = Talk(scripted)

    async def person(name: str, given: dict[str, Any], context: Any) -> Any:
        talk.asked.append({"name": name, "input": given})
        assert case.person is not None
        if name not in case.person:
            return PermissionResultDeny(message=NO)
        updates = case.person[name].get("updatedPermissions")
        return PermissionResultAllow(
            updated_permissions=updates and [PermissionUpdate.from_dict(update) for update in updates]
        )

    given = dict(case.options)
    if "agents" in given:
        given["agents"] = {name: AgentDefinition(**agent) for name, agent in given["agents"].items()}
    async with Client(gateway.url, token=gateway.token("shop")) as client:
        made = options(
            client.tenant("shop"),
            model=MODEL,
            env=scripted.environment(home),
            can_use_tool=None if case.person is None else person,
            **given,
        )
        async with ClaudeSDKClient(made) as agent:
            await agent.query("go on")
            async for _ in agent.receive_response():
                pass
    return talk


async def by_typescript(case: Case, gateway: LiveGateway, scripted: Model, home: Path, program: Path) -> Talk:
    given = {
        re.sub(r"_(\w)", lambda found: found[1].upper(), name): value for name, value in case.options.items()
    }
    async with agent(program, scripted, home, gateway, "shop", "go on", person=case.person, **given) as made:
        await made.ended()
    assert not made.of("error"), made.told
    return Talk(scripted, made.of("asked"))


def at(block: Block, home: Path) -> Block:
    """Return a call with the plans of this home."""
    given = block.get("input", {})
    if not str(given.get("file_path")).startswith("PLANS/"):
        return block
    path = given["file_path"].replace("PLANS", str(home / ".claude/plans"))
    return {**block, "input": {**given, "file_path": path}}


@pytest.mark.parametrize("sdk", ["python", "typescript"])
@pytest.mark.parametrize("name", CASES)
async def test_who_decides(name: str, sdk: str, gateway: LiveGateway, program: Path, tmp_path: Path) -> None:
    case = CASES[name]
    (tmp_path / ".claude").mkdir()
    async with asyncio.timeout(90), model(*([at(call, tmp_path)] for call, _ in case.calls)) as scripted:
        if sdk == "python":
            talk = await by_python(case, gateway, scripted, tmp_path)
        else:
            talk = await by_typescript(case, gateway, scripted, tmp_path, program)
    assert [one["name"] for one in talk.asked] == list(case.asked)
    for call, wanted in case.calls:
        if call["type"] == "tool_use":
            assert wanted in scripted.result(call).text, (call, scripted.result(call))
    plans = [one["input"]["plan"] for one in talk.asked if "plan" in one["input"]]
    assert plans == (["1. build it\n"] if "ExitPlanMode" in case.asked else [])
    offered = {tool["name"] for tool in scripted.requests[0]["tools"]}
    eight = {"Bash", "BashOutput", "Edit", "Glob", "Grep", "KillShell", "Read", "Write"}
    less = {one[1:] for one in case.tools if one.startswith("-")}
    assert offered == (eight | set(case.tools) - {f"-{one}" for one in less}) - less
    # neither a log of what failed nor a rule or a plan: what the CLI keeps of itself alone
    left = subprocess.run(["grep", "-rlE", "ran|gone|build|precious|echo", tmp_path], capture_output=True)
    assert left.stdout == b"", left.stdout.decode()


@pytest.mark.parametrize("sdk", ["python", "typescript"])
async def test_a_new_conversation_begins_in_the_workspace(
    sdk: str, gateway: LiveGateway, program: Path, tmp_path: Path
) -> None:
    """Of a named session, and of one tenant in one program; where it is resumed it goes on where it stood."""
    async with gateway.wire("shop", session=f"designer-{sdk}") as wire:
        there = (await wire.call("tools/call", name="Bash", arguments={"command": "pwd; mkdir -p deep"}))[
            "content"
        ][0]["text"].strip()
        await wire.call("tools/call", name="Bash", arguments={"command": "cd deep"})
    calls = [use("Bash", command="pwd; cd deep"), use("Bash", command="pwd")]
    async with (
        asyncio.timeout(90),
        model(*([call] for call in calls)) as scripted,
        contextlib.AsyncExitStack() as s,
    ):
        home = tmp_path
        if sdk == "typescript":
            made = await s.enter_async_context(
                agent(
                    program, scripted, home, gateway, "shop", "go", session=f"designer-{sdk}", workspace=there
                )
            )
            await made.ended()
        else:
            client = await s.enter_async_context(Client(gateway.url, token=gateway.token("shop")))
            shop = client.tenant("shop", session=f"designer-{sdk}")
            given = {"env": scripted.environment(home), "model": MODEL, "workspace": there}
            one = await s.enter_async_context(ClaudeSDKClient(options(shop, **given)))
            await one.query("go")
            async for _ in one.receive_response():
                pass
    assert scripted.result(calls[0]).text == there
    assert scripted.result(calls[1]).text == f"{there}/deep"
