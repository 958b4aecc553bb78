"""The TypeScript client as a program has it: built as it is now, installed in a folder with its packages."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clients" / "typescript"


_built: tempfile.TemporaryDirectory[str] | None = None


async def built() -> Path:
    """Return the folder with the client as JavaScript, which is made once in this process."""
    global _built
    if _built is None:
        made = tempfile.TemporaryDirectory(prefix="gateway-typescript-")
        words = ("node_modules/typescript/bin/tsc", "-p", "tsconfig.build.json", "--outDir", made.name)
        compiling = await asyncio.create_subprocess_exec("node", *words, cwd=PACKAGE)
        assert await compiling.wait() == 0
        _built = made
    return Path(_built.name)


async def installed(folder: Path, program: str) -> Path:
    """Install the client, and copy one of its programs beside it; return where that is."""
    if shutil.which("node") is None and not os.environ.get("CI"):
        pytest.skip("there is no Node")
    modules = PACKAGE / "node_modules"
    assert (modules / "@anthropic-ai").is_dir(), "the client's packages are missing: tests/run setup"
    client = folder / "node_modules" / "@incus-gateway" / "client"
    client.mkdir(parents=True)
    shutil.copy(PACKAGE / "package.json", client)
    shutil.copytree(await built(), client / "dist")
    # of the newest SDK, with its own CLI: tests/integration/test_claude_newest.py
    newest = os.environ.get("GATEWAY_TEST_AGENT_SDK")
    for entry in modules.iterdir():
        if newest and entry.name == "@anthropic-ai":
            entry = Path(newest) / "node_modules" / entry.name
        (folder / "node_modules" / entry.name).symlink_to(entry)
    (folder / "package.json").write_text('{"type": "module"}')
    shutil.copy(PACKAGE / program, folder)
    return folder / Path(program).name
