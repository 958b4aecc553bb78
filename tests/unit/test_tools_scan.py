"""A large tree is looked through in shares: each file by one, and what is found is what one walk finds."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.errors import Timeout
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.walk import Walk
from gateway.rootfs.worker import SCAN, SCANNED, Workspace
from gateway.tools.call import decode
from gateway.tools.patterns import PatternError, compiled, translate
from gateway.tools.worker_operations import OPERATIONS

LIMITS = CallLimits()
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
        "umlaut.ts": "größer\n".encode(),
        "none.ts": b"from\n",
        "empty.ts": b"",
        "at-end.ts": b"x\n" * 200_000 + FORM,
        "large.ts": b".",
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
        for above in ("", "apps/web/"):
            texts[f"{above}node_modules/p{number}/lib/k.ts"] = FORM if number % 3 else b"nothing\n"
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    (tmp_path / os.fsdecode(b"bad-\xff.ts")).write_bytes(FORM)
    os.truncate(tmp_path / "large.ts", 17 << 20)
    (tmp_path / "link.ts").symlink_to("a.ts")
    (tmp_path / "folder.ts").symlink_to("src")
    os.mkfifo(tmp_path / "fifo.ts")
    return tmp_path


def ask(site: Path, operation: str, asked: dict[str, Any], limits: CallLimits) -> bytes:
    tree = Root(os.open(site, os.O_RDONLY | os.O_DIRECTORY), "/srv/site", depth=limits.depth_max)
    try:
        reply = OPERATIONS[operation](Workspace(tree, limits), asked)
    finally:
        tree.close()
    assert isinstance(reply, bytes)
    return reply


def scan(
    site: Path, given: dict[str, Any], number: int, count: int, limits: CallLimits = LIMITS
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
        {"pattern": "^one (form|none)$"},
        {"pattern": "größer|kleiner"},
        {"pattern": "form", "path": "apps/web/node_modules"},
        {"pattern": "\\bform\\b|nothing"},
        {"pattern": "form$\\n", "multiline": True},
        {"pattern": "form$", "output_mode": "content", "head_limit": 1},
        {"pattern": "FORM", "-i": True},
        {"pattern": "\\w+"},
        {"pattern": "^.?$"},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_finds_what_a_walk_finds(site: Path, given: dict[str, Any], count: int) -> None:
    listed = {**given, "output_mode": "files_with_matches", "head_limit": 10_000}
    asked = {"input": listed, "cwd": "/srv/site", "seen": None, "read_first": False}
    _, body = decode(ask(site, "Grep", {**asked, "brief": False, "named": None}, LIMITS))
    told = orjson.loads(body)["structuredContent"]
    shares = [scan(site, given, number, count) for number in range(count)]
    found = [name for share in shares if share is not None for name in share]
    assert None not in shares
    assert len(set(found)) == len(found)
    if len(found) > 20:
        assert all(shares)
    # of one that is too large nobody knows
    named_before = b"".join(name + b"\0" for name in found).decode("latin-1")
    _, body = decode(ask(site, "Grep", {**asked, "brief": False, "named": named_before}, LIMITS))
    assert orjson.loads(body)["structuredContent"] == told
    assert told["files"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"pattern": "function foo"}, ["function foo"]),
        ({"pattern": "form|from"}, ["form", "from"]),
        ({"pattern": "a|from"}, []),
        ({"pattern": "\\w+"}, []),
        ({"pattern": "form", "-i": True}, []),
        ({"pattern": "Größe"}, ["Größe"]),
    ],
)
def test_needles(given: dict[str, Any], wanted: list[str]) -> None:
    found = compiled(given["pattern"], bool(given.get("-i")), False)
    assert list(found.needles) == wanted


@pytest.mark.parametrize(
    ("pattern", "literals"),
    [
        ("a.b", ["a"]),
        ("a\\.b", ["a.b"]),
        ("fo*bar", ["bar"]),
        ("fo+b", ["fo"]),
        ("foo+*", ["fo"]),
        ("foo+{0,2}", ["fo"]),
        ("foo++*", ["fo"]),
        ("fo?", ["f"]),
        ("foo{2}", ["fo"]),
        ("fo{0}ba", ["ba"]),
        ("f(oo)bar", ["bar"]),
        ("(?:foo|bar)", [""]),
        ("(foo|bar)x|yy", ["x", "yy"]),
        ("^foo$", ["foo"]),
        ("\\bfoo\\B", ["foo"]),
        ("foo[xyz]ba", ["foo"]),
        ("[]|]foo", ["foo"]),
        ("[\\]|]foo", ["foo"]),
        ("\\x{66}oo", ["oo"]),
        ("\\p{L}foo", ["foo"]),
        ("\\pLfoo", ["foo"]),
        ("(?i)foo", [""]),
        ("foo(?i)bar", [""]),
        ("(?i:foo)bar", ["bar"]),
        ("(?s)foo", ["foo"]),
        ("foo|", ["foo", ""]),
        ("", [""]),
    ],
)
def test_literals(pattern: str, literals: list[str]) -> None:
    assert list(translate(pattern, multiline=False).literals) == literals


@pytest.mark.parametrize("patterns", [2000, pytest.param(8000, marks=pytest.mark.thorough)])
def test_what_matches_has_a_literal(patterns: int) -> None:
    """Whatever RE2 finds by a pattern made at random has one of the literals that are told of it."""
    chance = random.Random(3)
    atoms = [
        "a",
        "b",
        "ab",
        "\\.",
        ".",
        "\\w",
        "\\b",
        "^",
        "$",
        "[ab]",
        "[^a]",
        "[]a]",
        "é",
        "\\x61",
        "\\pL",
        "\\-",
    ]
    repeats = ["", "", "", "*", "+", "?", "{2}", "{0,1}", "{1,}", "*?", "+?", "+*", "++*", "+{0}"]

    def made(depth: int) -> str:
        parts = []
        for _ in range(chance.randint(1, 4)):
            kind = chance.random()
            if kind < 0.2 and depth:
                opens = chance.choice(["(", "(?:", "(?P<n>" if depth == 3 else "(", "(?i:"])
                atom = opens + made(depth - 1) + ")"
            elif kind < 0.25:
                atom = chance.choice(["(?s)", "(?i)", "(?-i)"])
            else:
                atom = chance.choice(atoms)
            bare = atom in ("^", "$", "\\b") or (
                atom.startswith("(?") and ":" not in atom and "<" not in atom
            )
            parts.append(atom + ("" if bare else chance.choice(repeats)))
        if chance.random() < 0.25:
            parts.insert(chance.randint(0, len(parts)), "|")
        return "".join(parts)

    told = 0
    for _ in range(patterns):
        pattern = made(3)
        try:
            find, literals = (
                compiled(pattern, False, True).find,
                translate(pattern, multiline=True).literals,
            )
        except PatternError:
            continue
        for _ in range(5):
            text = "".join(chance.choice("ab.é-AB\n") for _ in range(chance.randint(0, 8))).encode()
            start, end = find(text, 0)
            if start >= 0 and all(literals):
                told += 1
                assert any(one.encode() in text[start:end] for one in literals), (pattern, text, literals)
    assert told > patterns // 10


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({"pattern": "form("}, LIMITS),
        ({"pattern": "form", "path": "nowhere"}, LIMITS),
        ({"pattern": "form", "path": "../../etc"}, LIMITS),
        ({"pattern": "form", "path": "a.ts"}, LIMITS),
        ({"pattern": "form", "type": "no"}, LIMITS),
        ({"pattern": "form"}, CallLimits(visit_max=10)),
        ({"pattern": "form"}, CallLimits(depth_max=2)),
    ],
)
def test_leaves_to_others(site: Path, given: dict[str, Any], limits: CallLimits) -> None:
    """What is wrong, and what it would find less of, is for those who have words for it."""
    assert scan(site, given, 0, 1, limits) is None


@pytest.mark.parametrize("operation", [SCAN, "Grep"])
def test_takes_nothing_out_of_a_pipe(site: Path, operation: str) -> None:
    """What a process wrote for another is not read on the way, whatever else is."""
    pipe = os.open(site / "fifo.ts", os.O_RDWR | os.O_NONBLOCK)
    os.write(pipe, FORM)
    asked = {"input": {"pattern": "form"}, "cwd": "/srv/site", "share": [0, 1]}
    ask(site, operation, {**asked, "seen": None, "read_first": False, "brief": False, "named": None}, LIMITS)
    assert os.read(pipe, 100) == FORM
    os.close(pipe)


def test_takes_nothing_out_of_a_new_pipe(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it where the pipe takes a file's place before that is opened."""
    folders = Walk.folders
    held: list[int] = []

    def swapped(walk: Walk) -> Iterator[tuple[str, int, Collection[str]]]:
        for path, folder, names in folders(walk):
            if "a.ts" in names:
                os.replace(site / "fifo.ts", site / "a.ts")
                held.append(os.open(site / "a.ts", os.O_RDWR | os.O_NONBLOCK))
                os.write(held[0], FORM)
            yield path, folder, names

    monkeypatch.setattr(Walk, "folders", swapped)
    names = scan(site, {"pattern": "form"}, 0, 1)
    assert names is not None and b"a.ts" not in names and b"src/b.ts" in names
    assert os.read(held[0], 100) == FORM
    os.close(held[0])


def test_names_are_bounded(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.tools.grep.NAMED_MAX", 100)
    assert scan(site, {"pattern": "form"}, 0, 1) is None
    assert scan(site, {"pattern": "nowhere"}, 0, 1) == [b"large.ts"]


def test_ends_in_time(site: Path) -> None:
    with pytest.raises(Timeout):
        scan(site, {"pattern": "form"}, 0, 1, CallLimits(tool_timeout=0))
