"""No error advises a loss where another way exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# as a next step: at the begin of a clause, or after another one
LOSS = re.compile(
    r"(?:^|[;:,.(]|\bor|\band|\bto)\s+(?:please\s+)?(destroy|delete|remove|drop|wipe|rm)\b", re.I
)
# one that keeps everything, said before
ANOTHER = re.compile(
    r"\b(choose|raise|set|give|enlarge|make room|move|take|name|ask|chmod|stop|save|look)\b", re.I
)
# what says a tool of Claude Code word for word, asks for a confirmation, or describes a setting
NOT_OURS = ("gateway/tools/schemas.py", "gateway/cli/tenants.py", "gateway/settings/")


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every text that is not a docstring, with what is filled in as `{}`."""
    tree = ast.parse(source)
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for one in node.body:
                if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
                    inner.add(id(one.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values}
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def wrong(text: str) -> bool:
    """Say whether a text advises a loss first, or to destroy at all."""
    if "\n" in text or text == text.upper():  # a script, or the names of methods
        return False
    return any(
        found[1].lower() == "destroy" or not ANOTHER.search(text[: found.start()])
        for found in LOSS.finditer(text)
    )


def test_what_is_wrong() -> None:
    bad = ["it is taken; destroy it first", "the disk is full; remove files", "raise it, or destroy some"]
    good = ["choose another name, or delete that one", "stop destroys nothing", "it was removed"]
    assert [*map(wrong, bad + good)] == [True] * len(bad) + [False] * len(good)


def test_no_error_advises_a_loss_first() -> None:
    found = [
        f"{place}:{line} {text}"
        for folder in ("gateway", "clients/python/gateway_client")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not (place := str(path.relative_to(ROOT))).startswith(NOT_OURS)
        for line, text in messages(path.read_text())
        if wrong(text)
    ]
    found += [
        f"{path.relative_to(ROOT)}:{line} {text.strip()}"
        for folder in ("clients/typescript/src", "clients/web/src")
        for path in sorted((ROOT / folder).rglob("*.ts"))
        for line, text in enumerate(path.read_text().splitlines(), 1)
        for said in re.findall(r"\"([^\"]+)\"|'([^']+)'|`([^`]+)`", text)
        if wrong("".join(said))
    ]
    assert found == []
