"""A large tree is looked through in shares: each file by one, and what is found is what one walk finds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.errors import Timeout
from gateway.rootfs.operations import SCAN, SCANNED, Limits, Workspace
from gateway.rootfs.tree import Tree
from gateway.tools.answer import decode
from gateway.tools.operations import OPERATIONS
from gateway.tools.scanning import quick

LIMITS = Limits()
FORM = b"one form\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Folders of every depth around where shares part, and files that are each looked at in their own way."""
    texts = {
        "a.ts": FORM,
        "src/b.ts": FORM,
        "src/ui/c.ts": FORM,
        "src/ui/deep/d.ts": FORM,
        "src/ui/deep/er/e.ts": FORM,
        ".hidden/f.ts": FORM,
        "none.ts": b"from\n",
        "empty.ts": b"",
        "at-end.ts": b"x\n" * 200_000 + FORM,
        "large.ts": b"." * (17 << 20),
        "wide.ts": FORM.decode().encode("utf-16"),
        "marked.ts": b"\xef\xbb\xbf" + FORM,
        "before.bin": FORM + b"." * 70_000 + b"\0",
        "after.bin": b"\0" + FORM,
        "high.ts": b"\xf0\x9f\x98\x80" + FORM,
        "new\nline.ts": FORM,
        ".git/config": FORM,
        ".gitignore": b"*.log\n!keep.log\n/built/\nsrc/ui/*.tmp\n",
        "x.log": FORM,
        "keep.log": FORM,
        "built/g.ts": FORM,
        "src/ui/h.tmp": FORM,
        "src/.ignore": b"i.ts\n",
        "src/i.ts": FORM,
        "node_modules/.pnpm/p/node_modules/p/j.ts": FORM,
    }
    for number in range(40):
        texts[f"node_modules/p{number}/lib/k.ts"] = FORM if number % 3 else b"nothing\n"
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    (tmp_path / os.fsdecode(b"bad-\xff.ts")).write_bytes(FORM)
    (tmp_path / "link.ts").symlink_to("a.ts")
    (tmp_path / "folder.ts").symlink_to("src")
    os.mkfifo(tmp_path / "fifo.ts")
    return tmp_path


def ask(site: Path, operation: str, asked: dict[str, Any], limits: Limits) -> bytes:
    tree = Tree(os.open(site, os.O_RDONLY | os.O_DIRECTORY), "/srv/site", depth=limits.depth_max)
    try:
        reply = OPERATIONS[operation](Workspace(tree, limits), asked)
    finally:
        tree.close()
    assert isinstance(reply, bytes)
    return reply


def scan(
    site: Path, given: dict[str, Any], number: int, count: int, limits: Limits = LIMITS
) -> list[bytes] | None:
    reply = ask(site, SCAN, {"input": given, "cwd": "/srv/site", "share": [number, count]}, limits)
    return reply.removeprefix(SCANNED).split(b"\0")[:-1] if reply.startswith(SCANNED) else None


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    "given",
    [
        {"pattern": "form"},
        {"pattern": "form", "path": "src"},
        {"pattern": "form", "path": "/srv/site/src/ui/deep"},
        {"pattern": "form", "path": "node_modules"},
        {"pattern": "form", "glob": "*.{ts,bin}"},
        {"pattern": "form", "glob": "!src/**"},
        {"pattern": "form", "type": "ts"},
        {"pattern": "FORM", "-i": True},
        {"pattern": "form$\\n", "multiline": True},
        {"pattern": "form$", "output_mode": "content", "head_limit": 1},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_finds_what_a_walk_finds(site: Path, given: dict[str, Any], count: int) -> None:
    listed = {**given, "output_mode": "files_with_matches", "head_limit": 10_000}
    asked = {"input": listed, "cwd": "/srv/site", "seen": None, "read_first": False}
    _, body = decode(ask(site, "Grep", {**asked, "brief": False, "sifted": None}, LIMITS))
    told = orjson.loads(body)["structuredContent"]
    shares = [scan(site, given, number, count) for number in range(count)]
    found = [name for share in shares if share is not None for name in share]
    assert None not in shares
    assert len(set(found)) == len(found)
    assert count == 1 or given.get("path") not in (None, "node_modules") or all(shares)
    # of one that is too large nobody knows
    sifted = b"".join(name + b"\0" for name in found).decode("latin-1")
    _, body = decode(ask(site, "Grep", {**asked, "brief": False, "sifted": sifted}, LIMITS))
    assert orjson.loads(body)["structuredContent"] == told
    assert told["files"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"pattern": "function foo"}, True),
        ({"pattern": "useState<"}, True),
        ({"pattern": "a\\.b"}, True),
        ({"pattern": "form*"}, True),
        ({"pattern": "for*"}, False),
        ({"pattern": "fo"}, False),
        ({"pattern": "(form)"}, False),
        ({"pattern": "\\bform"}, False),
        ({"pattern": "^form"}, False),
        ({"pattern": "form|from"}, False),
        ({"pattern": "form", "-i": True}, True),
        ({"pattern": "Some", "-i": True}, False),
    ],
)
def test_is_for_what_begins_with_a_literal(given: dict[str, Any], wanted: bool) -> None:
    assert quick(given) is wanted


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({"pattern": "\\w+"}, LIMITS),
        ({"pattern": "form("}, LIMITS),
        ({"pattern": "form", "path": "nowhere"}, LIMITS),
        ({"pattern": "form", "path": "../../etc"}, LIMITS),
        ({"pattern": "form", "path": "a.ts"}, LIMITS),
        ({"pattern": "form", "type": "no"}, LIMITS),
        ({"pattern": "form"}, Limits(visit_max=10)),
        ({"pattern": "form"}, Limits(depth_max=2)),
    ],
)
def test_leaves_to_others(site: Path, given: dict[str, Any], limits: Limits) -> None:
    """What is wrong, and what it would find less of, is for those who have words for it."""
    assert scan(site, given, 0, 1, limits) is None


def test_ends_in_time(site: Path) -> None:
    with pytest.raises(Timeout):
        scan(site, {"pattern": "form"}, 0, 1, Limits(tool_timeout=0))
