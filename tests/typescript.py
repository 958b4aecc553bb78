"""The TypeScript client as a program has it: built as it is now, installed in a folder with its packages."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clients" / "typescript"


async def installed(folder: Path, program: str) -> Path:
    """Install the client, and copy one of its programs beside it; return where that is."""
    if shutil.which("node") is None and not os.environ.get("CI"):
        pytest.skip("there is no Node")
    modules = PACKAGE / "node_modules"
    assert (modules / "@anthropic-ai").is_dir(), "the client's packages are missing: tests/run setup"
    client = folder / "node_modules" / "@incus-gateway" / "client"
    client.mkdir(parents=True)
    shutil.copy(PACKAGE / "package.json", client)
    words: list[str | Path] = [
        "node",
        modules / "typescript/bin/tsc",
        "-p",
        "tsconfig.build.json",
        "--outDir",
        client / "dist",
    ]
    built = await asyncio.create_subprocess_exec(*words, cwd=PACKAGE)
    assert await built.wait() == 0
    for entry in modules.iterdir():
        (folder / "node_modules" / entry.name).symlink_to(entry)
    (folder / "package.json").write_text('{"type": "module"}')
    shutil.copy(PACKAGE / program, folder)
    return folder / Path(program).name
