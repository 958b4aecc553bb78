"""The tests that CI leaves out are there, and so is what holds their property in each run."""

from __future__ import annotations

import re
from pathlib import Path

from tests import thorough

ROOT = Path(__file__).parents[2]
CONTRACTS = "".join(path.read_text() for path in sorted(ROOT.glob("tests/contracts/*.py")))
NAMED = [(file, name) for files in thorough.LEFT.values() for file, names in files.items() for name in names]


def is_there(file: str, name: str) -> bool:
    text = (ROOT / file).read_text()
    *classes, test = re.sub(r"\[.*", "", name).split("::")
    if test[0].isupper():
        classes, test = [test], ""
    found = text + CONTRACTS if classes else text
    return all(f"\nclass {one}(" in text for one in classes) and (not test or f"def {test}(" in found)


def test_each_that_is_named_is_there() -> None:
    """So that one which gets another name is not back in CI unseen."""
    assert [one for one in NAMED if not is_there(*one)] == []
    assert [one for one in NAMED if not thorough.leaves("::".join(one))] == []


def test_each_is_named_once_and_no_other_is_left_out() -> None:
    assert len(NAMED) == len(set(NAMED))
    file, name = NAMED[0]
    assert thorough.leaves(f"{file}::{name}[x]")
    assert not thorough.leaves(f"{file}::{name}_and_more")
    assert not thorough.leaves(f"tests/unit/test_thorough.py::{name}")


def test_what_holds_it_in_each_run_is_there() -> None:
    for why in thorough.LEFT:
        for named in re.findall(r"\b(?:tests|clients)/[\w/]+(?:\.py)?", why):
            assert named == "tests/run" or (ROOT / named).exists(), named
        for test in re.findall(r"\btest_\w+(?![\w.])", why):
            files = (*ROOT.glob("tests/integration/*.py"), *ROOT.glob("tests/e2e/*.py"))
            assert any(f"def {test}(" in path.read_text() for path in files), test
