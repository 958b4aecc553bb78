"""Claude in a tenant from TypeScript: the real Agent SDK in Node and Bun, a scripted model, containers.

Each agent is a process of its own, `clients/typescript/tests/agent.js`, as a program that builds on the SDK
has it. The CLI is the Python SDK's: npm's is the same program, and 400 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.host.toolchain import CACHE, bun_variant, ensure_bun
from gateway.settings import Settings
from gateway_client import Client, Tenant
from tests.contracts.processes import Tree
from tests.integration.conftest import Container
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway
from tests.messages import MODEL, Block, Model, claude_program, model, say, use
from tests.typescript import PACKAGE, installed
from tests.waits import until

CLI = {} if "GATEWAY_TEST_AGENT_SDK" in os.environ else {"pathToClaudeCodeExecutable": str(claude_program())}
EIGHT = ["Bash", "BashOutput", "Edit", "Glob", "Grep", "KillShell", "Read", "Write"]


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("claude-typescript")
    async with live(incus_settings, folder / "gateway.log", GATEWAY_CANCEL_GRACE="0.5") as gateway:
        yield gateway


@pytest.fixture(scope="module")
async def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the agent, in a folder in which the client is installed as it is built now."""
    return await installed(tmp_path_factory.mktemp("agent"), "tests/agent.js")


class Agent:
    """One agent's process, and what it said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.told: list[Mapping[str, Any]] = []

    async def ended(self) -> None:
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(120):
                async for line in self.process.stdout:
                    self.told.append(json.loads(line))
                assert await self.process.wait() == 0
        except TimeoutError:
            raise AssertionError(f"it has not ended: {self.told}") from None

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        return [one for one in self.told if one["type"] == kind]

    def printed(self, call: Block) -> str:
        return "".join(one["text"] for one in self.of("output") if one["call"] == call["id"])


@contextlib.asynccontextmanager
async def agent(
    program: Path,
    scripted: Model,
    home: Path,
    gateway: LiveGateway,
    tenant: str,
    *prompts: str,
    runtime: str = "node",
    live: bool = False,
    interrupt: str | None = None,
    person: Mapping[str, Any] | None = None,
    session: str | None = None,
    **options: Any,
) -> AsyncIterator[Agent]:
    """Run an agent that is asked these prompts, each after the last one's answer."""
    home.mkdir(exist_ok=True)
    said = {
        "url": gateway.url,
        "token": gateway.token(tenant),
        "tenant": tenant,
        "prompts": prompts,
        "live": live,
        "interrupt": interrupt,
        "person": person,
        "session": session,
        "options": {"model": MODEL, **CLI, **options},
    }
    found = "node" if runtime == "node" else str(await asyncio.to_thread(ensure_bun, bun_variant(), CACHE))
    process = await asyncio.create_subprocess_exec(
        found,
        str(program),
        json.dumps(said),
        env={"PATH": os.environ["PATH"], **scripted.environment(home)},
        cwd=home,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    try:
        yield Agent(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def shop(gateway: LiveGateway, shared_tenant: Container) -> AsyncIterator[Tenant]:
    async with Client(gateway.url, token=gateway.token(shared_tenant.name)) as client:
        yield client.tenant(shared_tenant.name)


def traps(home: Path, folder: Path) -> None:
    """Put what must not be found where the CLI by itself would look for it."""
    for place in (home / ".claude", folder / ".claude"):
        place.mkdir(parents=True)
        hook = {"hooks": [{"type": "command", "command": "exit 2"}]}
        (place / "settings.json").write_text(json.dumps({"hooks": {"PreToolUse": [hook]}}))
    for memory in (home / ".claude/CLAUDE.md", folder / "CLAUDE.md", folder / "CLAUDE.local.md"):
        memory.write_text("MARKED-MEMORY")
    theirs = {"type": "stdio", "command": "touch", "args": [str(folder / "started")]}
    (folder / ".mcp.json").write_text(json.dumps({"mcpServers": {"theirs": theirs}}))
    for file in (folder / "notes.txt", home / "secret.txt"):
        file.write_text("MARKED-FILE")
    skill = home / ".claude/skills/theirs/SKILL.md"
    skill.parent.mkdir(parents=True)
    skill.write_text("---\nname: theirs\ndescription: MARKED-SKILL\n---\nMARKED-SKILL")


def drawn(kind: str) -> bytes:
    """Return a red image, or a PDF of one red page."""
    data = io.BytesIO()
    Image.new("RGB", (32, 16), (200, 30, 30)).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(("runtime", "bare"), [("node", True), ("bun", False)])
async def test_an_agent_works_in_the_tenant_and_reaches_nothing_else(
    gateway: LiveGateway, shop: Tenant, program: Path, tmp_path: Path, runtime: str, bare: bool
) -> None:
    """The eight tools by the names that the model knows; output while Bash runs, images, pages.

    None of the host's tools, files, settings, memory, skills or servers. Sub-agents, which there are where it
    is not bare, have the same tools. An interrupt ends the command's whole tree, and the session goes on.
    """
    home, folder, place = tmp_path / "home", tmp_path / "folder-of-the-host", f"of-{runtime}"
    traps(home, folder)
    await shop.files.write(f"{place}/red.png", drawn("PNG"), create_dirs=True)
    await shop.files.write(f"{place}/page.pdf", drawn("PDF"))
    tree = Tree()
    write = use("Write", file_path=f"{place}/a.txt", content="one\ntwo\n")
    edit = use("Edit", file_path=f"{place}/a.txt", old_string="two", new_string="three")
    reads = [
        use("Read", file_path=f"{place}/a.txt"),
        use("Grep", pattern="thr", output_mode="content", path=place),
        use("Glob", pattern=f"{place}/*.txt"),
    ]
    moved = use("Bash", command=f"cd {place} && hostname; echo $HOME")
    there, foreign = use("Bash", command="pwd; exit 3"), use("WebFetch", url="x", prompt="y")
    # relative to where Bash stands by then
    image, page = use("Read", file_path="red.png"), use("Read", file_path="page.pdf", pages="1")
    wrong = use("Edit", file_path="a.txt", old_string="x" * 30_000, new_string="y")
    waits = use("Bash", command="rm -f ~/go; echo go on; until [ -e ~/go ]; do sleep 0.05; done; echo two")
    helper = use(
        "Agent", subagent_type="tester", description="test it", prompt="look", run_in_background=False
    )
    of_helper, over = use("Read", file_path="a.txt"), use("Bash", command=tree.script)
    after = use("Bash", command="echo on")
    helped = [] if bare else [[helper], [of_helper], [say("seen")]]
    calls = [[write], [edit], reads, [moved], [there, foreign], [image, page], [wrong], [waits]]
    script: list[Sequence[Block]] = [*calls, *helped, [say("well")], [over], [after]]
    prompts = [f"look at @notes.txt and @{home}/secret.txt and /init", "go on with that", "and then"]
    options: dict[str, Any] = {
        "cwd": str(folder),
        "systemPrompt": "You are a builder of shops.",
        "bare": bare,
    }
    if not bare:
        tester = {"description": "tests", "prompt": "You test.", "tools": ["Read", "Bash"]}
        options["agents"] = {"tester": tester}
    async with model(*script) as scripted:
        async with agent(
            program,
            scripted,
            home,
            gateway,
            shop.name,
            *prompts,
            runtime=runtime,
            live=True,
            interrupt="ready",
            **options,
        ) as made:
            await made.ended()

    def text(call: Block) -> str:
        # not bare, the CLI adds a reminder to what a tool said
        return scripted.result(call).text.partition("\n\n<system-reminder>")[0]

    results = [one["subtype"] for one in made.of("result")]
    assert results == ["success", "error_during_execution", "success"], made.told
    found = ["1\tone\n2\tthree\n3\t", f"{place}/a.txt:2:three", f"{place}/a.txt"]
    assert [text(one) for one in reads] == found
    assert text(moved).split() == [shop.name, "/home/site"]
    assert scripted.result(there).is_error and text(there) == f"Exit code 3\n/srv/site/{place}"
    assert "No such tool available: WebFetch" in text(foreign)
    for shown in (image, page):
        assert [part["type"] for part in scripted.result(shown).others] == ["image"], scripted.result(shown)
    assert scripted.result(wrong).is_error and text(wrong).count("truncated]") == 1
    assert 9_900 < len(text(wrong)) <= 10_000
    assert text(waits) == "go on\ntwo" and made.printed(waits) == "go on\ntwo\n"
    assert tree.alive() == 0 and scripted.result(over).is_error
    assert text(after) == "on"
    names = [sorted(tool["name"] for tool in asked.get("tools", ())) for asked in scripted.requests]
    assert names[0] == sorted([*EIGHT, *([] if bare else ["Agent"])])
    if not bare:
        assert text(of_helper).startswith("1\tone")
        assert ["Bash", "Read"] in names
    for mark in ("MARKED", "theirs", socket.gethostname()):
        assert mark not in scripted.heard.replace(str(tmp_path), ""), mark
    assert (folder.name in scripted.heard) is (not bare)
    assert not (folder / "started").exists()
    system = json.dumps(scripted.requests[0]["system"])
    assert (
        "You are a builder of shops." in system and "this one counts. The project lies in /srv/site" in system
    )


async def test_an_agent_that_is_aborted_or_killed_takes_its_command_along(
    gateway: LiveGateway, shop: Tenant, program: Path, tmp_path: Path
) -> None:
    """By its `abortController` at once; by SIGKILL some seconds later, when its calls have lingered."""

    async def end(runtime: str, way: signal.Signals) -> None:
        tree, home = Tree(), tmp_path / f"{runtime}-{way.name}"
        async with (
            model([use("Bash", command=tree.script)]) as scripted,
            agent(program, scripted, home, gateway, shop.name, "go", runtime=runtime) as made,
        ):
            await until(lambda: tree.alive() == tree.SIZE, 60)
            made.process.send_signal(way)
            await made.process.wait()
            await until(lambda: tree.alive() == 0, 60)

    await asyncio.gather(end("node", signal.SIGTERM), end("node", signal.SIGKILL), end("bun", signal.SIGTERM))


async def test_a_session_is_resumed_in_another_process(
    gateway: LiveGateway, shop: Tenant, program: Path, tmp_path: Path
) -> None:
    read = use("Read", file_path="none.txt")
    async with model([say("noted")], [read]) as scripted:
        async with agent(
            program, scripted, tmp_path, gateway, shop.name, "it is 42", persistSession=True
        ) as first:
            await first.ended()
        resume = first.of("result")[0]["session_id"]
        async with agent(
            program, scripted, tmp_path, gateway, shop.name, "what is it?", persistSession=True, resume=resume
        ) as second:
            await second.ended()
    asked = json.dumps(scripted.requests[1]["messages"])
    assert "it is 42" in asked and "noted" in asked and "what is it?" in asked
    assert "File does not exist" in scripted.result(read).text


async def test_the_example_of_the_docs_runs(
    gateway: LiveGateway, shop: Tenant, program: Path, tmp_path: Path
) -> None:
    """At most 20 lines, as they stand there, but for the address, the tenant and where the CLI is."""
    page = (PACKAGE.parents[1] / "docs" / "clients.md").read_text()
    found = re.findall(r"^```ts\n(.*?claudeOptions.*?)^```$", page.partition("## TypeScript")[2], re.M | re.S)
    source: str = found[0].rpartition("```ts\n")[2]
    assert len(source.splitlines()) <= 20
    for words, other in (
        ("http://127.0.0.1:8080", gateway.url),
        ('tenant("shop"', f'tenant("{shop.name}"'),
        (
            "claudeOptions(shop, {",
            f'claudeOptions(shop, {{ pathToClaudeCodeExecutable: "{claude_program()}",',
        ),
    ):
        assert words in source
        source = source.replace(words, other)
    example = program.with_name("example.js")
    example.write_text(source)
    call = use("Bash", command="echo from the container")
    async with asyncio.timeout(60), model([call]) as scripted:
        process = await asyncio.create_subprocess_exec(
            "node",
            str(example),
            env={
                "PATH": os.environ["PATH"],
                "TOKEN": gateway.token(shop.name),
                **scripted.environment(tmp_path),
            },
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await process.communicate()
    assert printed.decode().split("\n") == ["from the container", "success", ""]
