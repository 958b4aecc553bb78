"""The lockfiles say what pyproject.toml says, each file by its hash; `deploy/lock` renews them."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GATEWAY, TESTS = "deploy/requirements.txt", "tests/requirements.txt"
# what deploy/quickstart installs, and what tests/run does
EXTRAS = {GATEWAY: {"images", "mcp", "pdf"}, TESTS: set(PROJECT["project"]["optional-dependencies"])}
RENEW = "run deploy/lock"


def locked(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Return each distribution of a lockfile, as it is named there and with the hashes of its files."""
    found: dict[str, tuple[Requirement, list[str]]] = {}
    entries = re.sub(r"^ *#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for entry in entries.splitlines():
        requirement, *hashes = (str(part) for part in re.split(r"\s+--hash=", entry))
        parsed = Requirement(requirement)
        found[canonicalize_name(parsed.name)] = (parsed, hashes)
    return found


def asked(name: str) -> Iterator[Requirement]:
    """Yield what pyproject.toml asks for; extras of our own are given with what they bring."""
    project = PROJECT["project"]
    words = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    for extra in EXTRAS[name]:
        words += project["optional-dependencies"][extra]
    yield from (found for word in words if (found := Requirement(word)).name != project["name"])


@pytest.mark.parametrize("name", [GATEWAY, TESTS])
def test_what_is_asked_for_is_locked(name: str) -> None:
    there = locked(name)
    for requirement in asked(name):
        one = canonicalize_name(requirement.name)
        assert one in there, f"{name} lacks {requirement}: {RENEW}"
        (has,) = there[one][0].specifier
        assert requirement.specifier.contains(has.version), f"{name} has {has} for {requirement}: {RENEW}"


@pytest.mark.parametrize("name", [GATEWAY, TESTS])
def test_all_that_is_needed_is_locked_and_nothing_else(name: str) -> None:
    """By what the installed distributions say they need; what is for other systems may be more."""
    there = locked(name)
    pending = [(canonicalize_name(one.name), frozenset(one.extras)) for one in asked(name)]
    needed: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        distribution, extras = pending.pop()
        if (distribution, extras) in seen:
            continue
        seen.add((distribution, extras))
        needed.add(distribution)
        for line in importlib.metadata.requires(distribution) or ():
            one = Requirement(line)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                pending.append((canonicalize_name(one.name), frozenset(one.extras)))
    assert needed <= there.keys(), f"{name} lacks {needed - there.keys()}: {RENEW}"
    here = {one for one, (found, _) in there.items() if found.marker is None or found.marker.evaluate()}
    # a backport is needed by some Pythons alone, and is locked for all of them
    assert here - needed <= {"typing-extensions", "tzdata", "sniffio", "importlib-metadata"}, RENEW


def test_the_tests_run_what_a_gateway_gets() -> None:
    there = locked(TESTS)
    for one, (found, hashes) in locked(GATEWAY).items():
        also, its = there[one]  # which the tests may need on more systems
        assert (also.specifier, its) == (found.specifier, hashes), f"{one} differs: {RENEW}"


@pytest.mark.parametrize("name", [GATEWAY, TESTS])
def test_every_file_has_its_hash_and_no_place_is_named(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text and "--index" not in text and "--find" not in text and "--trusted" not in text
    there = locked(name)
    assert len(there) > 50
    for one, (found, hashes) in there.items():
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), one
        assert [part.operator for part in found.specifier] == ["=="] and found.url is None, one


def test_both_install_by_it() -> None:
    prepare = (ROOT / "deploy" / "prepare.sh").read_text()
    assert prepare.count("pip install") == 1 and prepare.count('"${pip[@]}"') == 2
    assert '"${pip[@]}" --quiet --no-deps --require-hashes --only-binary :all: -r\n' in prepare
    assert '"${pip[@]}" --no-deps --no-build-isolation "$@"' in prepare
    for script, name in (("deploy/quickstart", GATEWAY), ("tests/run", TESTS)):
        text = (ROOT / script).read_text()
        assert len(re.findall(r"\bpip\b", text)) == 0, "only prepare.sh installs"
        (call,) = re.findall(r'ensure_venv "\$venv" "\$stamp" (\S+)', text)
        assert call.strip('"').removeprefix("$checkout/") == name
