"""The examples of README.md, as they stand there, against a real gateway, container, SDK and CLI."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.settings import Settings
from tests.integration.conftest import Container
from tests.integration.test_gateway_incus import live
from tests.live import SECRET, LiveGateway
from tests.messages import claude, claude_program, model, use

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, tmp_path_factory.mktemp("readme") / "gateway.log") as gateway:
        yield gateway


def example(word: str, language: str, gateway: LiveGateway, tenant: str) -> str:
    """Return the one example with `word` in it, for this gateway and tenant instead of the README's."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    (found,) = (block for block in blocks if word in block)
    return (
        str(found)
        .replace("http://127.0.0.1:8080", gateway.url)
        .replace('tenant("demo")', f'tenant("{tenant}")')
        .replace("/tenants/demo/", f"/tenants/{tenant}/")
        .replace("--tenant demo", f"--tenant {tenant}")
    )


async def run(*words: str, cwd: Path, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *words,
        env={**os.environ, **environment},
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(90):
        printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()
    return printed.decode()


async def python(text: str, token: str, cwd: Path, **environment: str) -> str:
    from sys import executable

    return await run(executable, "-c", f"TOKEN = {token!r}\n{text}", cwd=cwd, **environment)


async def test_the_python_example(gateway: LiveGateway, shared_tenant: Container, tmp_path: Path) -> None:
    name = shared_tenant.name
    printed = await python(example(".sync", "python", gateway, name), gateway.token(name), tmp_path)
    assert "stdout b'src/hello.txt:Hello\\n" in printed or "stdout b'Hello\\n" in printed
    assert "Exit(code=0" in printed
    assert shared_tenant.sh("cat /srv/site/src/hello.txt") == "Hello\n"


async def test_the_claude_example(gateway: LiveGateway, shared_tenant: Container, tmp_path: Path) -> None:
    name = shared_tenant.name
    text = example("claude_agent_sdk", "python", gateway, name)
    blue = use("Write", file_path="blue.css", content="body { color: blue }\n")
    async with model([blue]) as scripted:
        await python(text, gateway.token(name), tmp_path, **scripted.environment(tmp_path))
        assert not scripted.result(blue).is_error
    assert shared_tenant.sh("cat /srv/site/blue.css") == "body { color: blue }\n"


async def test_the_line_for_claude_code(
    gateway: LiveGateway, shared_tenant: Container, tmp_path: Path
) -> None:
    """The CLI keeps the server by that line, and works in the tenant by it afterwards."""
    name = shared_tenant.name
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "claude").symlink_to(claude_program())
    line = example("claude mcp add", "sh", gateway, name)
    ask = use("mcp__demo__Bash", command="pwd")
    async with model([ask]) as scripted:
        path = f"{programs}:{os.environ['PATH']}"
        environment = scripted.environment(tmp_path) | {"PATH": path, "GATEWAY_SECRET": SECRET}
        await run("sh", "-ec", line, cwd=tmp_path, **environment)
        await claude(scripted, tmp_path, "-p", "go", "--allowedTools", "mcp__demo")
        assert scripted.result(ask).text.startswith("/srv/site")
