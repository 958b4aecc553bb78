"""One Grep, whichever way it is answered: by a walk, or from what workers found in their shares of a tree.

Trees, patterns and options are made at random from what either treats in its own way; the seed is in the name
of the test.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.worker import SCAN, SCANNED, Workspace
from gateway.tools.call import decode
from gateway.tools.worker_operations import OPERATIONS
from tests import thorough

LIMITS = CallLimits(tool_timeout=100)  # which engine is late is not what is compared here
WORKSPACE = "/srv/site"
SEEDS = range(12) if thorough.ALL else range(2, 12, 3)  # of trees, from some files to some hundred
ASKED = 60  # Greps of each
FOLDERS = ("src", "lib", "node_modules", ".hidden", "build", "a b", "ü", "packages", ".git")
NAMES = ("a.ts", "b.tsx", "c.py", ".env", "README", "x.log", "é.txt", "f.min.js", "new\nline.ts")
WORDS = (
    "form",
    "Form",
    "FORM",
    "größer",
    "GRÖSSER",
    "ſet",
    "K",
    "été",
    "x",
    "foo_bar",
    "42",
    "٣",
    " ",
    "\t",
    "import",
)
IGNORED = (
    *(
        "*.log",
        "build/",
        "!x.log",
        "/src",
        "src/*.ts",
        "**/lib",
        "node_modules",
        "a.*",
        "!a.ts",
        "# note",
        "",
    ),
    *("/*/c.py", "é*", "*.{ts,py}", "lib/**", "!/lib/a.ts", ".env"),
)
PATTERNS = (
    *(
        "form",
        "Form|größer",
        "foo_bar$",
        "^import",
        "K",
        "k",
        "ſ",
        "s",
        "\\bform\\b",
        "\\bé",
        "t\\b",
        "\\w+é\\w*",
    ),
    *(
        "\\d",
        "\\d+$",
        "^$",
        "^",
        "$",
        "x*",
        "(a|b)*",
        "\\s+form",
        "[^a-z\\s]",
        "(?i)form",
        "f.rm",
        "zzz",
        ".",
        "\\W",
    ),
    *(
        "form\\s*$",
        "é|ö",
        "\\x66orm",
        "[[:upper:]]+",
        "\\S+\\s\\S+",
        "\\Bo",
        "fo{1,2}",
        "\\p{Lu}",
        "form\\r?$",
    ),
)
SPANNING = ("form\\n", "form\\s+x", "(?s)form.*x", "x\\n\\n", "\\nform", "[^x]+x", "$\\n^", "\\s+")


def content(chance: random.Random) -> bytes:
    """Return a file's bytes: mostly text, in the forms of text that searches tell apart."""
    end = chance.choice(("\n", "\n", "\n", "\r\n"))
    lines = [" ".join(chance.choices(WORDS, k=chance.randint(0, 5))) for _ in range(chance.randint(0, 12))]
    text = end.join(lines) + chance.choice(("", end))
    kind = chance.random()
    if kind < 0.06:
        return text.encode("utf-16")
    if kind < 0.1:
        return b"\xef\xbb\xbf" + text.encode()
    if kind < 0.16:
        data = text.encode()
        at = chance.randint(0, len(data))
        return data[:at] + b"\0" + data[at:]
    if kind < 0.2:
        return text.encode() + chance.choice((b"\xff\xfe\xff", b"\xe9", b"\xf0\x9f\x98\x80"))
    if kind < 0.23:  # more than is read at once, and than a block of ripgrep's
        return b"y\n" * chance.choice((40_000, 140_000)) + text.encode() + chance.choice((b"", b"\0"))
    return text.encode()


def fill(site: Path, chance: random.Random) -> list[str]:
    """Lay a tree; return its folders."""
    folders = [""]
    for _ in range(chance.choice((0, 2, 8, 30))):
        above = chance.choice(folders)
        name = chance.choice(FOLDERS)
        path = f"{above}/{name}".lstrip("/")
        if path not in folders and path.count("/") < 7:
            (site / path).mkdir()
            folders.append(path)
    for folder in folders:
        for name in chance.sample(NAMES, chance.randint(0, len(NAMES))):
            (site / folder / name).write_bytes(content(chance))
        for name in (".gitignore", ".ignore", ".rgignore"):
            if chance.random() < 0.2:
                (site / folder / name).write_text(
                    "\n".join(chance.choices(IGNORED, k=chance.randint(0, 4))) + "\n"
                )
    if chance.random() < 0.3:
        os.truncate(site / "README", 17 << 20) if (site / "README").exists() else None
    if chance.random() < 0.5:
        (site / "link.ts").symlink_to(chance.choice(("a.ts", "src", "/etc/passwd")))
    return folders


def asked(folders: list[str], chance: random.Random) -> dict[str, Any]:
    """Return the input of a Grep."""
    multiline = chance.random() < 0.2
    given: dict[str, Any] = {"pattern": chance.choice(SPANNING if multiline else PATTERNS)}
    if multiline:
        given["multiline"] = True
    if chance.random() < 0.3:
        given["-i"] = True
    if chance.random() < 0.4:
        given["path"] = chance.choice(folders) or "."
    if chance.random() < 0.2:
        given["glob"] = chance.choice(
            ("*.ts", "*.{ts,tsx}", "!src/**", "**/lib/*", "!*.log", "a*", ".env", "build/**")
        )
    if chance.random() < 0.15:
        given["type"] = chance.choice(("ts", "py", "js", "all"))
    given["output_mode"] = mode = chance.choice(("files_with_matches", "count", "content"))
    if mode == "content":
        for name, values in (
            ("-n", (True, False)),
            ("-o", (True,)),
            ("-C", (1,)),
            ("-B", (2,)),
            ("-A", (1, 3)),
        ):
            if chance.random() < 0.2:
                given[name] = chance.choice(values)
    if chance.random() < 0.3:
        given["head_limit"] = chance.choice((0, 1, 5))
    if chance.random() < 0.2:
        given["offset"] = chance.choice((1, 3))
    return given


def ask(root: Root, operation: str, arguments: dict[str, Any]) -> bytes:
    reply = OPERATIONS[operation](Workspace(root, LIMITS), orjson.loads(orjson.dumps(arguments)))
    assert isinstance(reply, bytes)
    return reply


def answer(root: Root, given: dict[str, Any], named: bytes | None) -> Any:
    arguments = {"input": given, "cwd": WORKSPACE, "seen": None, "read_first": False, "brief": False}
    told = None if named is None else named.decode("latin-1")
    head, body = decode(ask(root, "Grep", {**arguments, "named": told}))
    return head, orjson.loads(body)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    root = Root(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), WORKSPACE)
    yield root
    root.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_alike(tmp_path: Path, root: Root, seed: int) -> None:
    """To the letter, text and data, in every mode; and most Greps are really answered both ways."""
    chance = random.Random(seed)
    folders = fill(tmp_path, chance)
    found = shared = 0
    for _ in range(ASKED):
        given = asked(folders, chance)
        walked = answer(root, given, None)
        shares = chance.choice((1, 2, 4))
        parts = [
            ask(root, SCAN, {"input": given, "cwd": WORKSPACE, "share": [share, shares]})
            for share in range(shares)
        ]
        if all(part.startswith(SCANNED) for part in parts):
            shared += 1
            named = b"".join(part.removeprefix(SCANNED) for part in parts)
            assert answer(root, given, named) == walked, given
            found += bool(walked[1]["structuredContent"].get("files"))
        else:
            assert walked[0]["is_error"], given
    assert shared > ASKED // 2
    assert found or not any(path.is_file() for path in tmp_path.iterdir())
