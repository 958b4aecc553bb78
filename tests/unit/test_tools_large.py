"""Searches in large trees by real workers, each with its share: they find what one worker's walk finds."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from tests.unit.test_rootfs_workers import LaidRoot, folders, make_root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> LaidRoot:
    """More than a brief search looks at, with all that searches treat in their own way; nobody changes it."""
    root = make_root(tmp_path_factory.mktemp("large"))
    site = root.path / "srv" / "site"
    for number in range(1200):
        (site / f"plain{number:04}.txt").write_text("nothing here\n")
    texts = {
        "src/a.ts": b"one form\nForm two\nform form\n",
        "src/b/c.tsx": b"x\r\nform\r\n",
        "src/.hidden": b"form\n",
        "src/bin.dat": b"form\0form\n",
        "src/utf16.txt": "form é\n".encode("utf-16"),
        "src/bom.ts": b"\xef\xbb\xbfform\n",
        "src/multi.ts": b"for\nm\nform",
        "src/build/out.ts": b"form\n",
        "src/.gitignore": b"build/\n*.log\n",
        "src/x.log": b"form\n",
        ".git/config": b"form\n",
        "node_modules/p/index.js": b"form\n" * 3,
        "dir-b/form.ts": b"form\n",
        "dir/form.ts": b"form\n",
        "dir.ts": b"form\n",
        "of-no-type": b"form\n",
        "run.sh": b"form\n",
        ".env": b"form\n",
    }
    for name, text in texts.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(text)
    (site / os.fsdecode(b"bad-\xff.ts")).write_bytes(b"form\n")
    (site / "new\nline.ts").write_bytes(b"form\n")
    (site / "big.txt").write_bytes(b"form\n" + b"." * (17 << 20))
    (site / "link.ts").symlink_to("src/a.ts")
    (site / "host").symlink_to("/etc")
    return root


@pytest.fixture(scope="module")
async def workers(root: LaidRoot) -> AsyncIterator[Workers]:
    async with Workers(Settings(), folders(root.path.parent)) as running:
        yield running


GREPS: list[dict[str, Any]] = [
    {"pattern": "form"},
    {"pattern": "form", "output_mode": "count"},
    {"pattern": "form", "output_mode": "content", "-n": True},
    {"pattern": "form", "output_mode": "content", "-C": 1, "head_limit": 7, "offset": 2},
    {"pattern": "form", "output_mode": "content", "-o": True},
    {"pattern": "FORM", "-i": True},
    {"pattern": "for.m", "multiline": True, "output_mode": "content"},
    {"pattern": "form", "glob": "*.{ts,tsx}"},
    {"pattern": "form", "glob": "!src/**"},
    {"pattern": "form", "type": "ts"},
    {"pattern": "form", "type": "sh"},
    {"pattern": "form", "type": "all"},
    {"pattern": "^form$", "output_mode": "count"},
    {"pattern": "\\w+é"},
    {"pattern": "nowhere to be found"},
    {"pattern": "-e"},
]


@pytest.mark.parametrize("given", GREPS, ids=lambda given: " ".join(map(str, given.values())))
async def test_answers_as_a_walk(
    workers: Workers, root: LaidRoot, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared or by one worker, in every mode, the answer is the same to the letter."""
    tools = FileTools(workers, Settings())
    assert await workers.scan(root, {"input": given, "cwd": "/srv/site"}, 2) is not None
    shared = await tools.call(root, ToolSession(), "Grep", given)

    async def nothing(*_: object) -> None:
        return None

    monkeypatch.setattr(workers, "scan", nothing)
    walked = await tools.call(root, ToolSession(), "Grep", given)
    assert shared.data() == walked.data()


async def test_names_nothing_outside(workers: Workers, root: LaidRoot) -> None:
    """Links out of the workspace lead nowhere, as a start no more than on the way."""
    assert b"host" not in (
        await workers.scan(root, {"input": {"pattern": "root"}, "cwd": "/srv/site"}, 2) or b""
    )
    for path in ("host", "/etc", "../../etc"):
        given = {"pattern": "root", "path": path}
        assert await workers.scan(root, {"input": given, "cwd": "/srv/site"}, 2) is None


async def test_refuses_to_be_misled(workers: Workers, root: LaidRoot) -> None:
    """Input that is not Grep's, and a pattern that is none, is left to the walk, which says why."""
    for given in (
        {"pattern": "("},
        {"pattern": 7},
        {"pattern": "a", "--pre": "/bin/sh"},
        {"pattern": "a", "type": "no"},
    ):
        assert await workers.scan(root, {"input": given, "cwd": "/srv/site"}, 2) is None
