"""The five file tools answer like Claude Code's own, case by case.

`tests/data/claude_cases.jsonl` was recorded from Claude Code 2.1.331, and so was `claude_further_cases.jsonl`
where the two once differed. Every case of a file tool runs twice on a temporary folder: in this process, and
in workers, which as root are confined as in production.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.rootfs import FilesystemRoot
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.worker import SCAN, SCANNED, Workspace
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools import media
from gateway.tools.call import ToolFailure
from gateway.tools.schemas import FILE_TOOLS
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from gateway.tools.worker_operations import OPERATIONS
from tests import thorough
from tests.unit.test_rootfs_workers import MAPPED, USER, folders

WORKSPACE = "/srv/site"
CASES = [
    json.loads(line)
    for name in ("claude_cases", "claude_further_cases")
    for line in (Path(__file__).parents[1] / "data" / f"{name}.jsonl").read_text().split("\n")
    if line
]
FILE_CASES = [case for case in CASES if case["tool"] in FILE_TOOLS]

# Cases of the file tools that are not run, each with its reason.
LEFT = {
    "read-persisted-output": "needs Bash: it is run with the cases of that",
    **(
        {}
        if media.pillow is not None
        else {"read-image-downscale": "optional: needs Pillow, which the extra `images` installs"}
    ),
}


class HereWorkers:
    """Stands in for `Workers`: runs the operations in this process on one folder.

    With `large` every Grep is taken for one of a large tree, which is looked through in shares.
    """

    def __init__(self, folder: Path, *, large: bool = False, limits: CallLimits | None = None) -> None:
        self._large = large
        self.scanned: bytes | None = None  # what the last look through a large tree named
        self._tree = Root(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), WORKSPACE)
        self._workspace = Workspace(self._tree, limits or CallLimits())

    def close(self) -> None:
        self._tree.close()

    def alone(self, tenant: str) -> bool:
        return True

    async def scan(self, root: FilesystemRoot, arguments: dict[str, Any], shares: int) -> bytes | None:
        given = [{**arguments, "share": [share, 3]} for share in range(3)]
        found = [await self.call(root, SCAN, one) for one in given]
        named = b"".join(one[1:] for one in found)
        self.scanned = named if all(one.startswith(SCANNED) for one in found) else None
        return self.scanned

    def rests(self, tenant: str) -> bool:
        return False

    async def call(
        self, root: FilesystemRoot, operation: str, arguments: dict[str, Any], *, search: bool = False
    ) -> bytes:
        if self._large and operation == "Grep" and arguments["brief"]:
            return ToolFailure("timeout", "too much for a brief search").answer().encode()
        reply = OPERATIONS[operation](self._workspace, json.loads(json.dumps(arguments)))
        assert isinstance(reply, bytes)
        return reply


class Site:
    """One empty workspace and one session."""

    def __init__(self, folder: Path, tools: FileTools, root: FilesystemRoot) -> None:
        self.folder = folder
        self.tools = tools
        self.root = root
        self.session = ToolSession()

    def place(self, path: str) -> Path:
        assert path.startswith(WORKSPACE)
        return Path(str(self.folder) + path[len(WORKSPACE) :])

    def lay(self, item: dict[str, Any]) -> None:
        path = self.place(item["path"])
        if item.get("dir"):
            path.mkdir(parents=True, exist_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if "symlink" in item:
            path.symlink_to(item["symlink"])
            return
        data = base64.b64decode(item["base64"]) if "base64" in item else item["text"].encode()
        path.write_bytes(data * item.get("times", 1))
        if "mode" in item:
            path.chmod(int(item["mode"], 8))
        if "mtime" in item:
            os.utime(path, (item["mtime"], item["mtime"]))

    def own(self) -> None:
        """Give everything to the tenant's user."""
        if MAPPED:
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, USER, USER, follow_symlinks=False)

    async def step(self, step: dict[str, Any]) -> None:
        if "wait_ms" in step:
            time.sleep(step["wait_ms"] / 1000)
        elif "exec" in step:
            script = step["exec"].replace(WORKSPACE, str(self.folder))
            subprocess.run(["sh", "-c", script], cwd=self.folder, check=True)
            self.own()
        elif step["tool"] == "Bash":
            # The only thing that a case of a file tool asks of Bash: that its working directory stays.
            command = step["input"]["command"]
            assert command.startswith("cd ")
            self.session.cwd = os.path.normpath(f"{self.session.cwd or WORKSPACE}/{command[3:]}")
        else:
            result = await self.tools.call(self.root, self.session, step["tool"], step["input"])
            assert result.is_error == step.get("is_error", False), result.data()


@pytest.fixture(scope="session")
async def workers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Workers]:
    async with Workers(Settings(), folders(tmp_path_factory.getbasetemp())) as running:
        yield running


# in a worker in each run, and at night in this process, too
@pytest.fixture(params=["here", "worker"] if thorough.ALL else ["worker"])
async def site(request: pytest.FixtureRequest, tmp_path: Path, workers: Workers) -> AsyncIterator[Site]:
    folder = tmp_path / "srv" / "site"
    folder.mkdir(parents=True)
    root = FilesystemRoot(tmp_path.name, WORKSPACE)
    if request.param == "here":
        here = HereWorkers(folder)
        yield Site(folder, FileTools(here, Settings()), root)  # type: ignore[arg-type]  # the stand-in
        here.close()
    else:
        yield Site(folder, FileTools(workers, Settings()), root)
        await workers.forget(root.tenant)


def shown(result: dict[str, Any]) -> str:
    return "\n".join(block["text"] for block in result["content"] if block["type"] == "text")


def size_of(data: bytes) -> tuple[int, int]:
    """Return width and height of a PNG, GIF or scaled JPEG from its header."""
    if data.startswith(b"\x89PNG"):
        width, height = struct.unpack(">II", data[16:24])
    else:
        assert data.startswith(b"GIF8")
        width, height = struct.unpack("<HH", data[6:10])
    return width, height


def check_images(expected: list[dict[str, Any]], content: list[dict[str, Any]]) -> None:
    images = [block for block in content if block["type"] == "image"]
    assert len(images) == len(expected)
    for want, block in zip(expected, images, strict=True):
        width, height = size_of(base64.b64decode(block["data"]))
        if "mimeType" in want:
            assert block["mimeType"] == want["mimeType"]
            assert (width, height) == (want["width"], want["height"])
        else:
            assert max(width, height) <= want["max_side"]


def check_files(expected: dict[str, Any], site: Site) -> None:
    for name, want in expected.items():
        path = site.place(name)
        match want:
            case None:
                assert not path.exists()
            case str():
                assert path.read_bytes().decode() == want
            case _:
                data = path.read_bytes()
                if "text" in want:
                    assert data.decode() == want["text"]
                if "base64" in want:
                    assert data == base64.b64decode(want["base64"])
                if "match" in want:
                    assert re.fullmatch(want["match"], data.decode(), re.DOTALL)
                if "mode" in want:
                    assert path.stat().st_mode & 0o7777 == int(want["mode"], 8)


@pytest.mark.parametrize("case", FILE_CASES, ids=[case["id"] for case in FILE_CASES])
async def test_case(case: dict[str, Any], site: Site) -> None:
    """The answer, and the files after it, are those that Claude Code's own tool gave."""
    if case["id"] in LEFT:
        pytest.skip(LEFT[case["id"]])
    await check(case, site)


GREPS = [case for case in FILE_CASES if case["tool"] == "Grep"]


@pytest.mark.parametrize("case", GREPS, ids=[case["id"] for case in GREPS])
async def test_grep_of_a_large_tree(case: dict[str, Any], tmp_path: Path) -> None:
    """In shares of a tree the same is found as in one walk through it, where that way is taken."""
    here = HereWorkers(tmp_path, large=True)
    root = FilesystemRoot(tmp_path.name, WORKSPACE)
    try:
        await check(case, Site(tmp_path, FileTools(here, Settings()), root))  # type: ignore[arg-type]
    finally:
        here.close()


async def check(case: dict[str, Any], site: Site) -> None:
    """Lay what a case lays, do what it does, and compare."""
    for item in case["setup"]:
        site.lay(item)
    site.own()
    site.session.read_before_write = case.get("option") == "read_before_write"
    for step in case.get("before", ()):
        await site.step(step)
    call = await site.tools.call(site.root, site.session, case["tool"], case["input"])
    result = call.data()
    text = shown(result)
    assert result["isError"] is call.is_error
    assert call.is_error == case["is_error"], text
    if "text" in case:
        assert text == case["text"]
    if "match" in case:
        assert re.fullmatch(case["match"], text, re.DOTALL), text
    if "images" in case:
        check_images(case["images"], result["content"])
    check_files(case.get("files_after", {}), site)
    assert list(site.folder.rglob(".gateway-*")) == []
