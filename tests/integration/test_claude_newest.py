"""The agents' tests once more, with the newest SDKs that PyPI and npm have. For the night: it needs both."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.typescript import PACKAGE

TESTS = Path(__file__).parent
# each takes some 100 MB with its CLI
PYTHON = ("claude-agent-sdk", "anthropic", "mcp")
NPM = ("@anthropic-ai/claude-agent-sdk@latest", "@anthropic-ai/sdk", "@modelcontextprotocol/sdk")


async def run(*words: str, cwd: Path = TESTS.parents[1], environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end, at most 25 minutes, and return what it printed; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *words,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(1500):
            printed = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, printed[-20_000:]
    return printed


@pytest.mark.timeout(2000)
async def test_agents_work_with_the_newest_sdks(tmp_path: Path) -> None:
    """What a person denies does not run, nothing of the host is offered: whatever the CLI has become."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade", "--target")
    await run(*pip, str(tmp_path / "python"), *PYTHON)
    (tmp_path / "package.json").write_text("{}")
    npm = await run(
        "npm", "install", "--no-audit", "--no-fund", "--prefix", str(tmp_path), *NPM, cwd=tmp_path
    )
    newest = {
        "GATEWAY_TEST_THOROUGH": "1",
        "PYTHONPATH": str(tmp_path / "python"),
        "GATEWAY_TEST_AGENT_SDK": str(tmp_path),
    }
    files = ("integration/test_claude_permissions.py", "integration/test_claude.py")
    more = (
        "integration/test_claude_typescript.py",
        "unit/test_client_claude.py",
        "integration/test_anthropic.py",
    )
    words = (
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-q",
        *(str(TESTS.parent / one) for one in (*files, *more)),
    )
    printed = await run(sys.executable, "-m", "pytest", *words, environment=newest)
    assert " passed" in printed and "skipped" not in printed, npm + printed
    # the SDK's options, which are read from its types
    await run("npx", "vitest", "run", "tests/claude.test.ts", cwd=PACKAGE, environment=newest)
