"""Every limit of a file tool's call has a setting, and who meets it is told which."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Timeout
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from tests.unit.test_rootfs_workers import PROBES, LaidRoot, folders, make_root

SETTINGS = Settings(write_max=2000, list_max=100, tool_timeout=5.0)
LIMITS = CallLimits(
    read_max=1000, result_max=3000, visit_max=300, matches_max=40, depth_max=8, pattern_max=50
)


class Site:
    def __init__(self, root: LaidRoot, workers: Workers) -> None:
        self.root = root
        self.folder = root.path / "srv" / "site"
        self.workers = workers

    async def call(self, tool: str, **given: Any) -> dict[str, Any]:
        tools = FileTools(self.workers, SETTINGS)
        return (await tools.call(self.root, ToolSession(), tool, given)).data()

    async def refused(self, tool: str, **given: Any) -> tuple[str, str, Any]:
        """Return code, words and the `limit` that is told of a call that must fail."""
        answer = await self.call(tool, **given)
        assert answer["isError"], answer
        facts = answer["structuredContent"]
        return facts["code"], answer["content"][0]["text"], facts.get("limit")

    def lay(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Workers(SETTINGS, folders(tmp_path), limits=LIMITS) as workers:
        yield Site(make_root(tmp_path), workers)


async def test_read_max(site: Site) -> None:
    """A file over `read_max` is read in ranges only."""
    site.lay("large.txt", "0123456\n" * 200)
    code, words, limit = await site.refused("Read", file_path="large.txt")
    assert (code, limit) == ("too_large", 1000)
    assert "File content (1.6KB) exceeds maximum allowed size" in words and "offset and limit" in words
    assert not (await site.call("Read", file_path="large.txt", offset=3, limit=2))["isError"]


async def test_result_max(site: Site) -> None:
    """A range over `result_max`, and names or lines over it, are refused or cut with a word."""
    site.lay("large.txt", "0123456\n" * 2000)
    code, words, _ = await site.refused("Read", file_path="large.txt", offset=2, limit=1900)
    assert code == "too_large" and "Use offset and limit" in words
    cut = await site.call("Grep", pattern="0", output_mode="content", head_limit=0)
    assert len(cut["content"][0]["text"]) < 3500
    for number in range(40):
        site.lay(f"{'n' * 200}{number}", "needle")
    code, words, limit = await site.refused("Grep", pattern="needle")
    assert (code, limit) == ("too_large", 3000) and "exceeds 3000 bytes" in words


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("Write", {"file_path": "new.txt", "content": "x" * 2001}),
        ("Write", {"file_path": "new.txt", "content": "é" * 1500}),
        ("Edit", {"file_path": "small.txt", "old_string": "small", "new_string": "x" * 2001}),
        ("Edit", {"file_path": "large.txt", "old_string": "small", "new_string": "x"}),
        ("Edit", {"file_path": "many.txt", "old_string": "s", "new_string": "ssss", "replace_all": True}),
    ],
)
async def test_write_max(site: Site, tool: str, given: dict[str, Any]) -> None:
    """No file over `write_max` is made or changed, and nothing is left of the attempt."""
    site.lay("small.txt", "small")
    site.lay("large.txt", "small" * 500)
    site.lay("many.txt", "s" * 600)
    before = {path.name: path.read_bytes() for path in site.folder.iterdir()}
    code, words, limit = await site.refused(tool, **given)
    assert (code, limit) == ("too_large", 2000), words
    assert {path.name: path.read_bytes() for path in site.folder.iterdir()} == before


async def test_matches_max(site: Site) -> None:
    """A Grep for all returns `matches_max`, and says so."""
    site.lay("many.txt", "x\n" * 100)
    for asked in (0, 99):
        answer = await site.call("Grep", pattern="x", output_mode="content", head_limit=asked)
        text = answer["content"][0]["text"]
        assert text.count("many.txt:") == 40 and "[Showing results with pagination = limit: 40]" in text
        assert answer["structuredContent"]["truncated"]
    rest = await site.call("Grep", pattern="x", output_mode="content", head_limit=0, offset=90)
    assert rest["content"][0]["text"].count("many.txt:") == 10


@pytest.mark.parametrize(("tool", "given"), [("Glob", {"pattern": "*.none"}), ("Grep", {"pattern": "none"})])
async def test_visit_max(site: Site, tool: str, given: dict[str, Any]) -> None:
    """A search that has looked at `visit_max` entries stops there, and says so."""
    for number in range(400):
        site.lay(f"d{number % 7}/{number}", "x")
    answer = await site.call(tool, **given)
    assert "(The search stopped after 300 files and folders." in answer["content"][0]["text"]


async def test_depth_max(site: Site) -> None:
    """Neither a path nor a search goes down more than `depth_max` folders; a search says so."""
    inside, outside = "/".join("d" * 8) + "/in.txt", "/".join("d" * 9) + "/out.txt"
    site.lay(inside, "needle")
    site.lay(outside, "needle")
    assert not (await site.call("Read", file_path=inside))["isError"]
    for tool, given in (
        ("Read", {}),
        ("Write", {"content": "x"}),
        ("Edit", {"old_string": "needle", "new_string": "x"}),
    ):
        code, words, _ = await site.refused(tool, file_path=outside, **given)
        assert code == "invalid_params" and "more than 8 folders" in words
    for tool, given in (("Glob", {"pattern": "**/*.txt"}), ("Grep", {"pattern": "needle"})):
        text = (await site.call(tool, **given))["content"][0]["text"]
        assert "in.txt" in text and "out.txt" not in text
        assert "(Folders more than 8 deep were left out.)" in text


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("Grep", {"pattern": "x" * 51}),
        ("Grep", {"pattern": "x", "glob": "*." + "x" * 50}),
        ("Grep", {"pattern": "x", "type": "x" * 51}),
        ("Glob", {"pattern": "*." + "x" * 50}),
    ],
)
async def test_pattern_max(site: Site, tool: str, given: dict[str, Any]) -> None:
    """A pattern over `pattern_max` characters is not compiled."""
    code, words, limit = await site.refused(tool, **given)
    assert (code, limit) == ("too_large", 50) and "has over 50 characters" in words


async def test_list_max(tmp_path: Path) -> None:
    """A list of more than `list_max` entries is cut, and says so."""
    root = make_root(tmp_path)
    for number in range(120):
        (root.path / "srv/site" / str(number)).touch()
    async with Workers(Settings(list_max=100), folders(tmp_path)) as workers:
        listed = json.loads(await workers.call(root, "files/list", {"path": ".", "depth": 1}))
    assert (len(listed["entries"]), listed["truncated"]) == (100, True)


@pytest.mark.parametrize(("tool", "given"), [("Glob", {"pattern": "*.none"}), ("Grep", {"pattern": "none"})])
async def test_tool_timeout(tmp_path: Path, tool: str, given: dict[str, Any]) -> None:
    """A search ends by itself after `tool_timeout` seconds, in words that say so."""
    settings = Settings(tool_timeout=0.001)
    async with Workers(settings, folders(tmp_path)) as workers:
        root = make_root(tmp_path)
        for number in range(600):
            (root.path / "srv/site" / f"d{number}").mkdir()
            (root.path / "srv/site" / f"d{number}" / "f").write_text("x")
        answer = (await FileTools(workers, settings).call(root, ToolSession(), tool, given)).data()
    assert answer["isError"] and answer["structuredContent"]["code"] == "timeout"
    assert "0.001 seconds" in answer["content"][0]["text"]


async def test_what_does_not_look_at_the_clock_is_killed(tmp_path: Path) -> None:
    """A call that passes its time without an end of its own costs its worker; the error is `timeout`."""
    async with Workers(Settings(tool_timeout=0.2), folders(tmp_path), PROBES) as workers:
        with pytest.raises(Timeout):
            await workers.call(make_root(tmp_path), "hang", {})


def test_defaults() -> None:
    """Every limit is finite; a call has ten seconds."""
    assert Settings().tool_timeout == 10.0
    assert all(0 < getattr(CallLimits(), name) < 1 << 40 for name in CallLimits.__slots__)
