"""The size of the house: what each package may hold, so that growth is a decision in a diff.

"Code" is lines without blank ones, comments and docstrings. A change that needs more raises a number here and
says why in its commit; one that frees room lowers it.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]

CODE: Final[dict[str, tuple[int, int]]] = {
    "(top)": (980, 11),
    "api": (4540, 29),
    "auth": (430, 4),
    "caddy": (500, 3),
    "cli": (2170, 10),
    "cluster": (4260, 15),
    "deployments": (3270, 16),
    "detection": (1090, 8),
    "events": (960, 6),
    "execs": (1760, 8),
    "files": (1640, 8),
    "history": (1220, 5),
    "holder": (380, 3),
    "host": (3550, 13),
    "incus": (1640, 9),
    "lifecycle": (720, 5),
    "limits": (750, 4),
    "migration": (1010, 5),
    "ownership": (690, 4),
    "protocol": (840, 6),
    "rootfs": (4340, 29),
    "runtime": (6400, 34),
    "server": (480, 3),
    "settings": (580, 3),
    "shells": (790, 3),
    "storage": (730, 4),
    "tools": (3940, 18),
    "transport": (710, 4),
}
"""What a package may hold, by its name under `gateway/`: lines of code, and modules."""

WIDE: Final = {
    "gateway/admission.py",
    "gateway/api/operation.py",
    "gateway/cluster/moves.py",
    "gateway/cluster/standby.py",
    "gateway/execs/exec.py",
}
"""Modules with a constructor that still takes more than it should. None may be added."""

QUESTIONS: Final = {
    # Where are tokens verified?
    r"jwt": "gateway/auth/tokens.py",
    # What confines a file worker?
    r"landlock|seccomp|chroot": "gateway/rootfs/confine.py",
    # What kills a command's tree?
    r"cgroup\.kill": "gateway/rootfs/command_cgroup.py",
    # What decides that a site is healthy?
    r"health": "gateway/deployments/health.py",
    # What decides that a deployment succeeded?
    r"verify": "gateway/deployments/verify.py",
    # Where is a Grep answered?
    r"grep": "gateway/tools/grep.py",
    # Where is a Read answered?
    r"\bRead\b": "gateway/tools/reading.py",
    # Where is an Edit answered?
    r"\bEdit\b|\bWrite\b": "gateway/tools/writing.py",
    # What keeps a repeated call from running twice?
    r"idempoten": "gateway/idempotency.py",
    # What writes server-sent events?
    r"text/event-stream": "gateway/api/routes/events.py",
    # What counts, and refuses what is too much?
    r"RateLimited": "gateway/admission.py",
    # What rolls a site back?
    r"rollback": "gateway/deployments/phases.py",
    # Which origins may a page have?
    r"origin": "gateway/api/http.py",
    # What makes a snapshot?
    r"snapshot": "gateway/runtime/incus/disks.py",
    # What watches files?
    r"inotify": "gateway/files/watcher.py",
    # Where is the database?
    r"sqlite": "gateway/storage/writer.py",
    # What makes the OpenAPI document?
    r"openapi": "gateway/api/openapi.py",
    # How do members of a cluster know one another?
    r"certificate": "gateway/cluster/identity.py",
    # What mends what differs from its record?
    r"reconcil": "gateway/deployments/reconciler.py",
    # What shows a PDF?
    r"pdf": "gateway/tools/media.py",
}
"""What somebody from outside would search for, and the file that must be among the first two hits."""


@cache
def modules() -> dict[str, str]:
    """Return the source of each module of the gateway, by its path."""
    return {
        str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "gateway").rglob("*.py"))
    }


def code_lines(source: str) -> int:
    """Return how many lines of a module are code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    silent = {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
        *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def package(path: str) -> str:
    return parts[1] if len(parts := path.split("/")) > 2 else "(top)"


def test_each_package_stays_within_its_budget() -> None:
    lines, counted = Counter[str](), Counter[str]()
    for path, source in modules().items():
        lines[package(path)] += code_lines(source)
        counted[package(path)] += 1
    over = {name: (lines[name], counted[name]) for name in counted if name not in CODE}
    over |= {
        name: (lines[name], counted[name])
        for name, (most, files) in CODE.items()
        if lines[name] > most or counted[name] > files
    }
    assert over == {}, f"{over} lines and modules; the budget is {[(name, CODE.get(name)) for name in over]}"


def test_no_budget_is_far_above_what_it_is_for() -> None:
    """Else growth would be no decision."""
    lines = Counter[str]()
    for path, source in modules().items():
        lines[package(path)] += code_lines(source)
    assert {
        name: (most, lines[name]) for name, (most, _) in CODE.items() if most > lines[name] * 1.03 + 30
    } == {}


def test_a_class_name_means_one_thing() -> None:
    where = defaultdict[str, list[str]](list)
    for path, source in modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                where[node.name.lstrip("_")].append(path)
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_constructors_are_handed_objects() -> None:
    """At most eight parameters, and two callables."""
    wide = list[str]()
    for path, source in modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs][1:]
                calls = [one for one in given if one.annotation and "Callable" in ast.unparse(one.annotation)]
                if len(given) > 8 or len(calls) > 2:
                    wide.append(path)
    assert set(wide) == WIDE


@pytest.mark.parametrize("words", QUESTIONS)
def test_it_is_found_by_the_word_of_the_field(words: str) -> None:
    """The file that answers is one of the two with the most hits, as `git grep -c` counts them."""
    told = subprocess.run(
        ["git", "grep", "-icE", words, "--", "gateway/*.py"], cwd=ROOT, capture_output=True, text=True
    )
    hits = sorted((line.rsplit(":", 1) for line in told.stdout.splitlines()), key=lambda one: -int(one[1]))
    assert QUESTIONS[words] in [path for path, _ in hits[:2]], hits[:5]
