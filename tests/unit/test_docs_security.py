"""Every test that docs/security.md names is there, so that what it says holds was tried."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# what stands in a cell of a table
_WORD = re.compile(r"`([^`]+)`")
_REASONS = ("what prevents it", "settings")  # headings of columns without tests
# by their text: a tree of each module would take seconds
_DEFINED = re.compile(
    r"^(?:|[ ]+(?=(?:async def|def|class) [tT]est))(?:async def|def|class) (\w+)", re.MULTILINE
)
_MODULE = re.compile(r"(?:[a-z0-9_]+/)*[a-z0-9_]+(?:\.py)?")


def rows(heading: str) -> Iterator[tuple[str, list[str]]]:
    """Yield what each row of a section's tables is about, and those of its cells that name tests."""
    text = (ROOT / "docs" / "security.md").read_text()
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    columns: list[int] = []
    for line in section.splitlines():
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        if not columns:
            columns = [at for at, cell in enumerate(cells) if at and cell not in _REASONS]
        elif not set(line) <= set("|-: "):
            yield cells[0], [cells[at] for at in columns]


def modules() -> dict[str, list[Path]]:
    """Return the modules of the tests by each way to name them."""
    found: dict[str, list[Path]] = {}
    for path in TESTS.rglob("*.py"):
        parts = path.relative_to(TESTS).with_suffix("").parts
        for at in range(len(parts)):
            found.setdefault("/".join(parts[at:]), []).append(path)
    return found


def names(path: Path) -> set[str]:
    """Return what a module calls its tests, their classes, and what else it defines at its top."""
    return set(_DEFINED.findall(path.read_text()))


def missing(cell: str, known: dict[str, list[Path]], defined: dict[Path, set[str]]) -> list[str]:
    """Return what of a cell is not there; a name is looked for in the modules that are named behind it."""
    lost: list[str] = []
    wanted: list[str] = []
    places: list[Path] = []

    def settle() -> None:
        for name in wanted:
            among = places or list(defined)
            if not any(name in one for path in among for one in defined[path]):
                lost.append(name)
        wanted.clear()
        places.clear()

    for word in _WORD.findall(cell):
        word = word.partition("[")[0]
        module = word.removesuffix(".py")
        if _MODULE.fullmatch(word) and module in known and ("test_" in word or "/" in word):
            places += known[module]
            continue
        if places:
            settle()
        wanted.append(word)
    settle()
    return lost


def test_every_test_that_is_named_is_there() -> None:
    known = modules()
    defined = {path: names(path) for paths in known.values() for path in paths}
    lost, named = [], 0
    for heading in ("Shared resources", "Attacks"):
        for about, cells in rows(heading):
            named += sum(len(_WORD.findall(cell)) for cell in cells)
            lost += [f"{about[:60]}: {name}" for cell in cells for name in missing(cell, known, defined)]
    assert lost == []
    assert named > 100  # the tables are really read


def test_each_share_names_a_test() -> None:
    for about, cells in rows("Shared resources"):
        assert any(_WORD.search(cell) for cell in cells), about


def test_what_is_not_there_is_found() -> None:
    here = Path(__file__)
    known = {"test_docs_security": [here], "unit/test_docs_security": [here]}
    defined = {here: names(here)}
    assert missing("`each_share_names` (`test_docs_security`), `is_found[x, y]`", known, defined) == []
    assert missing("`no_such`, `each_share` (`test_docs_security`)", known, defined) == ["no_such"]
    assert missing("`test_nothing` in `unit/test_docs_security.py`", known, defined) == ["test_nothing"]
    assert missing("`test_none`", known, defined) == ["test_none"]
